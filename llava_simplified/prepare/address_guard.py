"""Refuse connections to addresses that are not public (server-side request forgery, SSRF).

A list of URLs is untrusted. Without a guard, `http://169.254.169.254/...` would send a cloud machine's credentials to
whoever wrote the list, and `http://10.0.0.1/` would reach the machines behind the firewall. Checking the URL is not
enough, because a private address hides behind a public name, a redirect, an unusual notation (`http://2130706433/`,
`http://0177.0.0.1/`), or a DNS answer that changes between the check and the connection (DNS rebinding).

Therefore the check happens at the last possible moment: when the socket for an address is made, right before the
connection. At that point every name is resolved, and nothing can change any more:

    URL -> DNS -> address -> guard_address -> socket -> connect
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from functools import lru_cache
from typing import Any

# The text of the error, by which `fetch.name_failure` recognises it inside aiohttp's own errors.
ADDRESS_REFUSED = "address refused"

_IPV6_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is assigned to the public
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, for networks that have IPv6 only


def guard_address(info: tuple[Any, ...]) -> socket.socket:
    """Make the socket for an address, unless the address is not public.

    aiohttp calls this function (as its `socket_factory`) for every connection.

    Args:
        info: (family, type, protocol, canonical name, address), as `socket.getaddrinfo` returns it.

    Raises:
        OSError: The address is private, loopback, link-local, multicast or reserved.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise OSError(errno.EPERM, f"{ADDRESS_REFUSED}: {address[0]} is not public")
    return socket.socket(family, kind, protocol)


@lru_cache(maxsize=65536)
def is_public(text: str) -> bool:
    """Return whether an IPv4 or IPv6 address is public.

    Args:
        text: The address; a zone ("fe80::1%eth0") is ignored.
    """
    address: Any = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        inner = _embedded_ipv4(address)
        if inner is None:
            # `is_global` is true for much that no network routes. Only the unicast range is public.
            return address in _IPV6_UNICAST and address.is_global
        address = inner
    return address.is_global and not address.is_multicast


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address leads to, or None.

    It is embedded by IPv4-mapped addresses (::ffff:10.0.0.1), 6to4 (2002::/16), Teredo (2001::/32) and NAT64.
    """
    if address.ipv4_mapped:
        return address.ipv4_mapped
    if address.sixtofour:
        return address.sixtofour
    if address.teredo:
        _, client = address.teredo
        return client
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None

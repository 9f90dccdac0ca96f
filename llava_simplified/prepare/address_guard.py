"""Block connections to addresses that are not public (server-side request forgery, SSRF).

A list of URLs is untrusted. Without a guard, `http://169.254.169.254/...` would read the credentials of a cloud machine,
and `http://10.0.0.1/` would reach machines inside the firewall. Checking the URL is not sufficient: a public name, a
redirect or an unusual notation (`http://2130706433/`, `http://0177.0.0.1/`) can lead to a private address, and a DNS
answer can change between the check and the connection (DNS rebinding).

Therefore the check happens at the last possible moment: when the socket for an address is created, right before the
connection. At this point every name is resolved, and nothing can change any more:

    URL -> DNS -> address -> guard_address -> socket -> connect
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from functools import lru_cache
from typing import Any

# Text of the error. `fetch.name_failure` searches for it, because aiohttp wraps the error in its own types.
ADDRESS_REFUSED = "address refused"

# The only IPv6 range with public unicast addresses.
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
# These addresses embed an IPv4 address, for networks that have only IPv6.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def guard_address(info: tuple[Any, ...]) -> socket.socket:
    """Create the socket for a public address.

    aiohttp calls this function (as its `socket_factory`) for every connection.

    Args:
        info: (family, type, protocol, canonical name, address), as `socket.getaddrinfo` returns it.

    Raises:
        OSError: The address is private, loopback, link-local, multicast or reserved.
    """
    family, kind, protocol, _, address = info
    # (address, port) for IPv4; for IPv6, flow and scope follow.
    ip_address, *_ = address
    if not is_public(str(ip_address)):
        raise OSError(errno.EPERM, f"{ADDRESS_REFUSED}: {ip_address} is not public")
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
            # Check the unicast range too: `is_global` is also true for many addresses that no network routes.
            return address in _IPV6_UNICAST and address.is_global
        address = inner
    return address.is_global and not address.is_multicast


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that is embedded in an IPv6 address, or None.

    Such addresses are IPv4-mapped (::ffff:10.0.0.1), 6to4 (2002::/16), Teredo (2001::/32) and NAT64 addresses.
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

"""Penn Treebank tokens as the COCO caption server counts them, without Java.

The server runs Stanford's PTBTokenizer 3.4.1 (``-preserveLines -lowerCase``), then drops punctuation. This
module gives the same tokens; its rules were settled by comparing outputs on captions and random strings. It
is a maximal-munch scanner: at each position the rule that reaches farthest wins, what it only looks ahead at
included, and the first of equals.

One difference is meant: each caption is read alone. The original reads all captions as one stream, where the
first word of the next caption can decide whether a lone letter at the end of this one keeps its full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""What the server drops. It would drop brackets, but looks for "-LRB-" in lower-cased tokens: they stay."""

_SECOND = {
    "cannot": 3,
    "'twas": 3,
    "gonna": 2,
    "gotta": 2,
    "lemme": 2,
    "gimme": 2,
    "wanna": 2,
    "'tis": 2,
}
"""Two words written as one, and the length of the second."""

_WRITTEN = (
    {"{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-", "&lt;": "<", "&gt;": ">"}
    | {"¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$"}
    | {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", '"': "''", "&quot;": "''"}
    | dict.fromkeys(
        ["–", "—", "―", "\x96", "\x97", "---", "----", "&md;", "&mdash;", "&ndash;"], "--"
    )
)
_QUOTES = str.maketrans(
    {"\x91": "`", "‘": "`", "‛": "`", "‹": "`", "\x92": "'", "’": "'", "›": "'"}
    | {"\x93": "``", "“": "``", "«": "``", "\x94": "''", "”": "''", "»": "''"}
)
_AMP, _APOS, _NBSP = map(re.compile, ("(?i:&amp;)", "&apos;", "(?i:&nbsp;)"))
_PLAIN = re.compile(
    r"[A-Za-z][A-Za-z0-9]*(?=[ \n]|, )"
)  # most of a caption: no other rule reaches farther here

_MONTHS_DAYS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri"
_STATES = "Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn"
_STATES += "|Va|Vt|Wisc?|Wyo"
_CAPITAL_STATES = (
    "A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
_FIRMS = "Inc|Cos?|Corp|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq|Jr|Sr|Bros|(?:Ed|Ph)\\.D|Esq"
_TITLES = (
    "Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut"
    "|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|Invt|Elec|Natl|M[ft]g|Dept"
    "|Blvd|Rd|vs|Alex|Wm|Jos|Cie|a\\.k\\.a|cf|TREAS|Ph"
)
_STARTERS = (  # after one of these a lone letter with a full stop ends a sentence
    "A(?:bout|ccording|dditionally|fter|n|s|t)?|But|Did|During|Earlier|He(?:re|r)?|How(?:ever)?|I[fnt]|Last|Many|More"
    "|M[rs]\\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The(?:ir|n|re|se|y)?|This|We|Wh(?:en|ile|at|o|y)|Yet|You"
)
_FILES = "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py"
_FILES += "|sql|tar|txt|wav|x|xml|zip"


def _characters(wanted: Callable[[str, str], bool]) -> str:
    """The characters below U+D800 that `wanted(character, category)` takes, as the body of a regex class."""
    spans: list[list[int]] = []
    for code in range(0x80, 0xD800):
        if wanted(chr(code), unicodedata.category(chr(code))):
            if spans and spans[-1][1] == code - 1:
                spans[-1][1] = code
            else:
                spans.append([code, code])
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in spans)


def _words(alpha: str) -> list[str]:
    """Words, contractions, elisions. Group `quote`: apostrophes are made plain; group `two`: see _SECOND."""
    marks = _characters(
        lambda c, kind: c == "\xad" or ("\xff" < c < "\u0ed0" and kind in ("Mn", "Mc", "Sk"))
    )
    letter = rf"(?:[{alpha}{marks}]|&[aeiouAEIOU](?:acute|grave|uml);)"
    word = rf"{letter}(?:{letter}|\d)*(?:[.!?]{letter}(?:{letter}|\d)*)*"
    apos, any_apos = "(?:['\x92’]|(?i:&apos;))", "(?:['`\x91\x92‘’‛]|(?i:&apos;))"
    ending, negation = rf"{apos}(?:(?i:re|ve|ll)|[msdMSD])", rf"[nN]{any_apos}[tT]"
    elided = [
        rf"{apos}[nN]{apos}?|[lLdDjJ]{apos}|(?i:Dunkin|somethin|ol){apos}|{apos}(?i:em|cause|till?)|{apos}[2-9]0[sS]",
        rf"[A-HJ-XZn]{any_apos}[{alpha}]{{2,}}",
        rf"[{alpha}]+[aeiouyAEIOUY]{any_apos}[aeiouA-Z][{alpha}]*",
        r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    ]
    initial = rf"(?:[dDoOlL]{any_apos}[{alpha}\d])?"
    joined = rf"{initial}[{alpha}\d]+(?:[-_\u058a\u2010\u2011]{initial}[{alpha}\d]+)*"
    return [
        "(?P<two>(?i:cannot|'twas|'tis|gonna|gotta|lemme|gimme|wanna))",
        rf"({word}){ending}",
        rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*){negation}",
        rf"({word})",
        *(rf"({form})" for form in elided),
        rf"([yY]{apos})[{alpha}]",
        rf"(?P<quote>{ending})[^A-Za-z]",
        r"(')[A-Za-z][^ \t\n\r\xa0]",
        rf"(?P<quote>{ending})",
        rf"(?P<quote>{negation})",
        rf"({apos}\d\d)[\s]",
        rf"({word}\.)[,;:]",
        rf"((?i:Cap{apos}n|c{apos}est))",
        rf"([#＃]{letter}+)",
        r"([@＠][a-zA-Z_][a-zA-Z_0-9]*)",
        rf"({joined})",
        rf"({joined}\.)[,;:]",
    ]


def _names() -> list[str]:
    """Web addresses, tags, abbreviations, hyphenated and slashed compounds."""
    initials = r"(?:[A-Za-z](?:\.[A-Za-z])+|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-U\.(?:S\.S\.R|K)))"
    attribute = r"(?:[A-Za-z][\w:.\-]*(?: *= *(?:'[^']*'|\"[^\"]*\"|[A-Za-z][\w:.\-]*))?)"
    path = r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-])?"
    compound = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{initials}\.|[A-Za-z0-9\xad]+))+"
    slashed = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    ampersand = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    company = rf"(?i:{_MONTHS_DAYS}|{_STATES}|{_FIRMS}|etc|al|seq|Bldg)|{_CAPITAL_STATES}|[Pp](?i:p?t)[ye][sS]?"
    return [
        rf"(<(?:[!?][A-Za-z\-][^>\r\n]*|/?[A-Za-z][A-Za-z0-9_:.\-]*(?: +{attribute})* */?) *>)",
        r"(&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\#\d+);)",
        r"((?i:https?://)[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-])",
        rf"((?i:www\.)(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path})",
        rf"((?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu){path})",
        r"((?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}]*@(?:[^ \t\n\f\r\"<>|(){}.\xa0]+\.)*"
        r"[^ \t\n\f\r\"<>|(){}.\xa0]+(?:>|(?i:&gt;))?)",
        r"((?i:c\+\+|[cf]\#))",
        r"(-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls))",
        rf"({slashed}(?:\\?/{slashed}){{1,2}})",
        rf"([A-Za-z])\.\s+(?:{_STARTERS})[\s?!]",
        r"((?i:ca|figs?|prop|nos?|sect?s?|arts?|paras?|bldg|pp|op)\.)\s?\d",
        r"((?i:pt[ey]|co)\.)\s(?i:ltd|lim)",
        rf"((?:{company})\.)(?:.|\n)?(?:.|\n)?",
        rf"((?:(?i:{_TITLES})|M(?i:iss)|{initials}|[A-Za-z])\.)",
        rf"({initials})\s",
        rf"([A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.(?i:{_FILES}))[\s.?!,]",
        *(
            rf"({form}"
            for form in (
                rf"{compound})",
                rf"{compound}\.)[,;:]",
                rf"{ampersand}\.)[,;:]",
                rf"{ampersand})",
            )
        ),
    ]


def _numbers_and_signs() -> list[str]:
    """Numbers, money, telephone numbers, quotation marks, brackets, smileys, dots and all other signs."""
    face = r"[-^x=~<>']"
    return [
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        r"([-+]?(?:\d+(?:[.:,\xad\u066b\u066c]\d+)*|(?:[.:,\xad\u066b\u066c]\d+)+))",
        "([⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+))",
        r"((?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4})",
        r"([¼½¾⅓-⅞]|[A-Z]*\$|\#|[¢£¤¥\x80₠€؋฿₤￠￡￥￦])",
        r"((?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
        r"[0-9]{3,4}[- \xa0]?[0-9]{3,5})",
        r"((?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})",
        "((?i:&(?:amp|lt|gt|quot|md|mdash|ndash);)|\"|''|``)",
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        rf"({face}_{face}|\({face}[_.]?{face}\)|\([\^x=~<>']-[\^x=~<>'`]\))",
        r"(<<|>>|-+|@+|#+|_+|\*+|[?!]+|(?:\\\*){1,3})",
        r"([,;:/=<>{}()\[\]、.¡¿\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa。\x96\x97–—―])",
        "(\\.\\.\\.+|[\x85…]|\\.[ \xa0](?:\\.[ \xa0])+\\.)",
        r"(?P<quote>[`‘-‟\x82\x84\x91-\x94‹›«»]{1,2}|'|(?i:&apos;))",
        r"([+%&~^|\\¦§¨©¬®¯°-³´-º×÷·־׀׃׆׳״؀-؃؆-؊،ؔ؛؞٪٭܃-܍।॥๏᾽‖‗‚†-‥‰-‸※‾-⁂⁄⁺-₎℀-⅏←-⯿〒・！-／：-＠［-｀｛-･])",
    ]


@cache
def _rules() -> list[re.Pattern[str]]:
    alpha = "A-Za-z" + _characters(lambda c, kind: kind[0] == "L")
    return [re.compile(rule) for rule in _words(alpha) + _names() + _numbers_and_signs()]


def _next_token(text: str, at: int) -> tuple[str, int]:
    """The token at `at` ("" for a blank or what the server can't tokenize) and where the next may begin."""
    plain = _PLAIN.match(text, at)
    if plain and plain[0].lower() not in _SECOND:
        return plain[0], plain.end()
    best: re.Match[str] | None = None
    for rule in _rules():
        match = rule.match(text, at)
        if match and match.end() > (best.end() if best else at):
            best = match
    if best is None:
        return "", at + 1
    token = best[1] if best.lastgroup != "two" else best[1][: -_SECOND[best[1].lower()]]
    end = at + len(token)
    if best.lastgroup == "quote":
        return _APOS.sub("'", token).translate(_QUOTES), end
    if token.lower() in _WRITTEN:
        return _WRITTEN[token.lower()], end
    if token[:2] in ("..", ". ", ".\xa0", "…", "\x85"):
        return "...", end
    if "@" in token or token[0] == "<":
        return token.replace(" ", "\xa0"), end
    token = _AMP.sub("&", token).replace("\xad", "").replace(" ", "\xa0")
    return token.replace("(", "-LRB-").replace(")", "-RRB-"), end


def _scan(text: str) -> str:
    tokens, at = [], 0
    while at < len(text):
        token, at = _next_token(text, at)
        if token and token.lower() not in PUNCTUATION:
            tokens.append(token.lower())
    return " ".join(tokens)


_scan_chunk = lru_cache(maxsize=1 << 17)(_scan)
_ALONE = re.compile(
    r"[A-Za-z][A-Za-z0-9]*|[^\d.<(+]*|(?!(?i:ca|figs?|prop|nos?|sect?s?|arts?|paras?|bldg|pt[ey]|co|pp|op)\.)[A-Za-z]{2,}\."
)
"""Between blanks, what no rule reads together with what follows the blank."""


def tokenize(caption: str) -> str:
    """The caption's tokens, lower-cased, without punctuation, with one space between them.

    A token may hold a no-break space ("3\\xa01/2"), as the original's may. Line breaks count as spaces.
    """
    chunks = _NBSP.sub(" ", caption).split()
    if all(
        map(_ALONE.fullmatch, chunks)
    ):  # nearly all captions: words are looked up, not read again
        return " ".join(filter(None, (_scan_chunk(chunk + "\n") for chunk in chunks)))
    return _scan(" ".join(chunks) + "\n")

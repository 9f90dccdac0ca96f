r"""The rules of Stanford's PTBTokenizer 3.4.1, as regular expressions.

The Penn Treebank (Marcus et al. 1993) splits contractions ("do n't"), possessives ("cat 's") and punctuation from
words, and keeps abbreviations ("U.S."), numbers, web addresses and hyphenated compounds together. Stanford's tokenizer
is a scanner generated from such rules (`PTBLexer.flex`). The rules below were developed by comparing outputs on captions
and on random strings.

How to read a rule:

- Group 1, or the only group, is the token. The text after the group is lookahead: it counts for the length of the
  match, by which the rule is selected, but it is scanned again afterward.
- A group named `two` contains two words written as one ("cannot"): see `SECOND_WORD_LENGTH`.
- A group named `quote` is a token whose apostrophes and quotation marks are replaced by ASCII ones.
- The order of the rules matters: of two matches with the same length, the first wins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

SECOND_WORD_LENGTH = {
    "cannot": 3,
    "'twas": 3,
    "gonna": 2,
    "gotta": 2,
    "lemme": 2,
    "gimme": 2,
    "wanna": 2,
    "'tis": 2,
}
"""Two words that are written as one, and the length of the second: "can not", "gon na"."""

# ---- abbreviations that keep their full stop ----

MONTHS_AND_DAYS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri"
STATES = (
    "Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn"
    "|Tenn|Va|Vt|Wisc?|Wyo"
)
# Only the capitalized forms are abbreviations, since these are words in lower case ("la.", "ill.", "wash.").
CAPITALIZED_STATES = (
    "A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
COMPANIES_AND_DEGREES = (
    "Inc|Cos?|Corp|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq|Jr|Sr|Bros"
    r"|(?:Ed|Ph)\.D|Esq"
)
TITLES = (
    "Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt"
    "|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp"
    "|Mlle|Mme|Msgr|Sfc|Invt|Elec|Natl|M[ft]g|Dept|Blvd|Rd|vs|Alex|Wm|Jos|Cie|a\\.k\\.a|cf|TREAS|Ph"
)
# If one of these follows a single letter with a full stop ("vitamin C. The ..."), the full stop ends a sentence.
SENTENCE_STARTERS = (
    "A(?:bout|ccording|dditionally|fter|n|s|t)?|But|Did|During|Earlier|He(?:re|r)?|How(?:ever)?"
    r"|I[fnt]|Last|Many|More|M[rs]\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That"
    "|The(?:ir|n|re|se|y)?|This|We|Wh(?:en|ile|at|o|y)|Yet|You"
)
# Abbreviations that keep their full stop only before a number: "no. 5", "fig. 3".
BEFORE_NUMBERS = "ca|figs?|prop|nos?|sect?s?|arts?|paras?|bldg|pp|op"
FILE_SUFFIXES = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt"
    "|ps|py|sql|tar|txt|wav|x|xml|zip"
)


@cache
def compiled_rules() -> list[re.Pattern[str]]:
    """Return all rules, compiled, in order."""
    letters = "A-Za-z" + _character_ranges(lambda character, category: category[0] == "L")
    rules = _word_rules(letters) + _name_rules() + _number_and_sign_rules()
    return [re.compile(rule) for rule in rules]


def _character_ranges(is_wanted: Callable[[str, str], bool]) -> str:
    """Return the characters from U+0080 to U+D7FF that are wanted, as the inside of a character class.

    Letters above U+FFFF are excluded: Stanford's scanner works on UTF-16, where they are surrogate pairs, and has no rule
    for these.

    Args:
        is_wanted: Called with a character and its Unicode category.
    """
    ranges: list[tuple[int, int]] = []
    for code in range(0x80, 0xD800):
        character = chr(code)
        if not is_wanted(character, unicodedata.category(character)):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _word_rules(letters: str) -> list[str]:
    """Return the rules of words, contractions and elisions.

    Args:
        letters: All letters, as the inside of a character class.
    """
    # Soft hyphens, accents and vowel signs are parts of a word.
    marks = _character_ranges(
        lambda character, category: (
            character == "\xad"
            or ("\xff" < character < "\u0ed0" and category in ("Mn", "Mc", "Sk"))
        )
    )
    letter = rf"(?:[{letters}{marks}]|&[aeiouAEIOU](?:acute|grave|uml);)"
    # A word may contain a full stop between letters: "hello.World" is one token.
    word = rf"{letter}(?:{letter}|\d)*(?:[.!?]{letter}(?:{letter}|\d)*)*"
    apostrophe = "(?:['\x92’]|(?i:&apos;))"
    any_apostrophe = "(?:['`\x91\x92‘’‛]|(?i:&apos;))"
    ending = rf"{apostrophe}(?:(?i:re|ve|ll)|[msdMSD])"  # 're 've 'll 'm 's 'd
    negation = rf"[nN]{any_apostrophe}[tT]"  # n't
    elisions = [
        # 'n' of "rock 'n' roll", l' d' j', dunkin' somethin' ol', 'em 'cause 'til 'till, '90s
        rf"{apostrophe}[nN]{apostrophe}?|[lLdDjJ]{apostrophe}|(?i:Dunkin|somethin|ol){apostrophe}"
        rf"|{apostrophe}(?i:em|cause|till?)|{apostrophe}[2-9]0[sS]",
        # A letter in front: O'Reilly, d'Artagnan, ...
        rf"[A-HJ-XZn]{any_apostrophe}[{letters}]{{2,}}",
        # ... or a vowel before and a vowel or capital after it.
        rf"[{letters}]+[aeiouyAEIOUY]{any_apostrophe}[aeiouA-Z][{letters}]*",
        r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    ]
    initial = rf"(?:[dDoOlL]{any_apostrophe}[{letters}\d])?"
    hyphens = r"[-_\u058a\u2010\u2011]"
    joined = rf"{initial}[{letters}\d]+(?:{hyphens}{initial}[{letters}\d]+)*"
    return [
        "(?P<two>(?i:cannot|'twas|'tis|gonna|gotta|lemme|gimme|wanna))",
        # "cat's": the word ends before the ending; "don't": before the n of the negation.
        rf"({word}){ending}",
        rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*){negation}",
        rf"({word})",
        *(rf"({elision})" for elision in elisions),
        # "y'all" is "y' all".
        rf"([yY]{apostrophe})[{letters}]",
        # The endings themselves, which remain after their word.
        rf"(?P<quote>{ending})[^A-Za-z]",
        r"(')[A-Za-z][^ \t\n\r\xa0]",
        rf"(?P<quote>{ending})",
        rf"(?P<quote>{negation})",
        # A year without its century: '95.
        rf"({apostrophe}\d\d)[\s]",
        # A full stop before another mark belongs to the word: "foo.;".
        rf"({word}\.)[,;:]",
        rf"((?i:Cap{apostrophe}n|c{apostrophe}est))",
        # Tags and user names of social networks.
        rf"([#＃]{letter}+)",
        r"([@＠][a-zA-Z_][a-zA-Z_0-9]*)",
        # Compounds with hyphens or underscores.
        rf"({joined})",
        rf"({joined}\.)[,;:]",
    ]


def _name_rules() -> list[str]:
    """Return the rules of web addresses, markup, abbreviations and compounds."""
    initials = (
        r"(?:[A-Za-z](?:\.[A-Za-z])+"
        r"|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-U\.(?:S\.S\.R|K)))"
    )
    value = r"(?:'[^']*'|\"[^\"]*\"|[A-Za-z][\w:.\-]*)"
    attribute = rf"(?:[A-Za-z][\w:.\-]*(?: *= *{value})?)"
    not_in_url = r" \t\n\f\r\"<>|"
    # The last character of a URL is no punctuation mark: "see http://a.org/b."
    path = rf"(?:/[^{not_in_url}()]+[^{not_in_url}.!?(){{}},\-])?"
    compound = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{initials}\.|[A-Za-z0-9\xad]+))+"
    slashed = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    ampersand = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    company = (
        rf"(?i:{MONTHS_AND_DAYS}|{STATES}|{COMPANIES_AND_DEGREES}|etc|al|seq|Bldg)"
        rf"|{CAPITALIZED_STATES}|[Pp](?i:p?t)[ye][sS]?"
    )
    return [
        # HTML and XML tags, comments and declarations; character entities of old news wires.
        rf"(<(?:[!?][A-Za-z\-][^>\r\n]*|/?[A-Za-z][A-Za-z0-9_:.\-]*(?: +{attribute})* */?) *>)",
        r"(&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\#\d+);)",
        # URLs with a scheme, with www, and without either under the common domains.
        rf"((?i:https?://)[^{not_in_url}()]+[^{not_in_url}.!?(){{}},\-])",
        rf"((?i:www\.)(?:[^{not_in_url}.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path})",
        rf"((?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu){path})",
        # E-mail addresses, with or without angle brackets.
        r"((?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}]*@(?:[^ \t\n\f\r\"<>|(){}.\xa0]+\.)*"
        r"[^ \t\n\f\r\"<>|(){}.\xa0]+(?:>|(?i:&gt;))?)",
        # Programming languages; tokens that are Penn Treebank brackets already; S&P-500.
        r"((?i:c\+\+|[cf]\#))",
        r"(-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls))",
        # and/or, 24/7
        rf"({slashed}(?:\\?/{slashed}){{1,2}})",
        # Abbreviations. A lone letter before the start of a sentence loses its full stop.
        rf"([A-Za-z])\.\s+(?:{SENTENCE_STARTERS})[\s?!]",
        rf"((?i:{BEFORE_NUMBERS})\.)\s?\d",
        r"((?i:pt[ey]|co)\.)\s(?i:ltd|lim)",
        # The lookahead of up to two characters makes the match longer than those of rules that drop the full stop.
        rf"((?:{company})\.)(?:.|\n)?(?:.|\n)?",
        rf"((?:(?i:{TITLES})|M(?i:iss)|{initials}|[A-Za-z])\.)",
        rf"({initials})\s",
        # File names.
        rf"([A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.(?i:{FILE_SUFFIXES}))[\s.?!,]",
        # Compounds with hyphens, and capitals joined by an ampersand (R&B).
        rf"({compound})",
        rf"({compound}\.)[,;:]",
        rf"({ampersand}\.)[,;:]",
        rf"({ampersand})",
    ]


def _number_and_sign_rules() -> list[str]:
    """Return the rules of numbers, money, telephone numbers, quotation marks, brackets, smileys and signs."""
    face = r"[-^x=~<>']"
    return [
        # Dates: 12/31/2015.
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        # Numbers with groups, decimals, or the colon of a time. Arabic separators too.
        r"([-+]?(?:\d+(?:[.:,\xad\u066b\u066c]\d+)*|(?:[.:,\xad\u066b\u066c]\d+)+))",
        # Superscripts and subscripts.
        "([⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+))",
        # Fractions, also after a whole number: "3 1/2" is one token.
        r"((?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4})",
        # Fractions of one character; currencies (US$, £).
        r"([¼½¾⅓-⅞]|[A-Z]*\$|\#|[¢£¤¥\x80₠€؋฿₤￠￡￥￦])",
        # Telephone numbers, with an area code in brackets or with full stops between the groups.
        r"((?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
        r"[0-9]{3,4}[- \xa0]?[0-9]{3,5})",
        r"((?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})",
        # Entities; quotation marks.
        "((?i:&(?:amp|lt|gt|quot|md|mdash|ndash);)|\"|''|``)",
        # Smileys: :-) and ^_^
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
        rf"({face}_{face}|\({face}[_.]?{face}\)|\([\^x=~<>']-[\^x=~<>'`]\))",
        # Runs of one sign.
        r"(<<|>>|-+|@+|#+|_+|\*+|[?!]+|(?:\\\*){1,3})",
        # Single punctuation marks and brackets.
        r"([,;:/=<>{}()\[\]、.¡¿\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa。\x96\x97–—―])",
        # Ellipses, also with spaces.
        "(\\.\\.\\.+|[\x85…]|\\.[ \xa0](?:\\.[ \xa0])+\\.)",
        # Typographic quotation marks and apostrophes.
        r"(?P<quote>[`‘-‟\x82\x84\x91-\x94‹›«»]{1,2}|'|(?i:&apos;))",
        # Other signs and symbols.
        r"([+%&~^|\\¦§¨©¬®¯°-³´-º×÷·־׀׃׆׳״؀-؃؆-؊،ؔ؛؞٪٭܃-܍।॥๏᾽‖‗‚†-‥‰-‸※‾-⁂⁄⁺-₎℀-⅏←-⯿〒・！-／：-＠［-｀｛-･])",
    ]

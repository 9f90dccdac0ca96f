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
- A group named `space` is not a token.
- A group named `verbatim` is a token that is not rewritten: its soft hyphens, brackets and entities stay.
- The order of the rules matters: of two matches with the same length, the first wins.
"""

from __future__ import annotations

import re
from functools import cache

from llava_simplified.evaluation.ptb_characters import DIGITS, LETTERS, SIGNS, WORD_MARKS

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


# ---- spaces ----

SPACES = r" \t\xa0\u2000-\u200a\u3000"
LINE_BREAKS = r"\n\r\x0b\x0c\x85\u2028\u2029"
_SPACE = f"[{SPACES}{LINE_BREAKS}]"
_DIGIT = f"[{DIGITS}]"


@cache
def compiled_rules() -> list[re.Pattern[str]]:
    """Return all rules, compiled, in order."""
    rules = _word_rules() + _name_rules() + _number_and_sign_rules()
    return [re.compile(rule) for rule in rules]


def _word_rules() -> list[str]:
    """Return the rules of words, contractions and elisions."""
    letter = rf"(?:[{LETTERS}{WORD_MARKS}]|&[aeiouAEIOU](?:acute|grave|uml);)"
    # A word may contain a full stop between letters: "hello.World" is one token.
    word = rf"{letter}(?:{letter}|{_DIGIT})*(?:[.!?]{letter}(?:{letter}|{_DIGIT})*)*"
    apostrophe = "(?:['\x92’]|(?i:&apos;))"
    any_apostrophe = "(?:['`\x91\x92‘’‛]|(?i:&apos;))"
    ending = rf"{apostrophe}(?:(?i:re|ve|ll)|[msdMSD])"  # 're 've 'll 'm 's 'd
    negation = rf"[nN]{any_apostrophe}[tT]"  # n't
    elisions = [
        # 'n' of "rock 'n' roll", l' d' j', dunkin' somethin' ol', 'em 'cause 'til 'till, '90s
        rf"{apostrophe}[nN]{apostrophe}?|[lLdDjJ]{apostrophe}|(?i:Dunkin|somethin|ol){apostrophe}"
        rf"|{apostrophe}(?i:em|cause|till?)|{apostrophe}[2-9]0[sS]",
        # A single letter before the apostrophe: O'Reilly, D'Artagnan.
        rf"[A-HJ-XZn]{any_apostrophe}[{LETTERS}]{{2,}}",
        # A vowel before the apostrophe, and a vowel or a capital letter after it.
        rf"[{LETTERS}]+[aeiouyAEIOUY]{any_apostrophe}[aeiouA-Z][{LETTERS}]*",
        rf"[oO]{any_apostrophe}[oO]",
        r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    ]
    initial = rf"(?:[dDoOlL]{any_apostrophe}[{LETTERS}{DIGITS}])?"
    hyphens = r"[-_\u058a\u2010\u2011]"
    joined = rf"{initial}[{LETTERS}{DIGITS}]+(?:{hyphens}{initial}[{LETTERS}{DIGITS}]+)*"
    return [
        "(?P<two>(?i:cannot|'twas|'tis|gonna|gotta|lemme|gimme|wanna))",
        # In "cat's", the word ends before 's. In "don't", it ends before n't.
        rf"({word}){ending}",
        rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*){negation}",
        rf"({word})",
        *(rf"({elision})" for elision in elisions),
        # "y'all" is "y' all".
        rf"([yY]{apostrophe})[{LETTERS}]",
        # The endings themselves: the scanner continues with them after their word.
        rf"(?P<quote>{ending})[^A-Za-z]",
        r"(')[A-Za-z][^ \t\n\r\xa0]",
        rf"(?P<quote>{ending})",
        rf"(?P<quote>{negation})",
        # A year without its century: '95.
        rf"({apostrophe}[0-9][0-9]){_SPACE}",
        # A full stop before another mark belongs to the word: "foo.;".
        rf"({word}\.)[,;:、]",
        rf"((?i:Cap{apostrophe}n|c{apostrophe}est))",
        # Hashtags and user names of social networks.
        rf"(?P<verbatim>#{letter}+)",
        r"(@[a-zA-Z_][a-zA-Z_0-9]*)",
        # Compounds with hyphens or underscores.
        rf"({joined})",
        rf"({joined}\.)[,;:、]",
    ]


def _name_rules() -> list[str]:
    """Return the rules of web addresses, markup, abbreviations and compounds."""
    letter_or_digit = f"[{LETTERS}{WORD_MARKS}{DIGITS}]"
    initials = (
        r"(?:[A-Za-z](?:\.[A-Za-z])+"
        r"|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-U\.(?:S\.S\.R|K)))"
    )
    value = r"(?:'[^']*'|\"[^\"]*\"|[A-Za-z][\w:.\-]*)"
    attribute = rf"(?:[A-Za-z][\w:.\-]*(?: *= *{value})?)"
    tag = rf"<(?:[!?][A-Za-z\-][^>\r\n]*|/?[A-Za-z][A-Za-z0-9_:.\-]*(?: +{attribute})* */?) *>"
    not_in_url = r" \t\n\f\r\"<>|"
    # The last character of a URL is not a punctuation mark: "see http://a.org/b."
    path = rf"(?:/[^{not_in_url}()]+[^{not_in_url}.!?(){{}},\-])?"
    compound = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{initials}\.|[A-Za-z0-9\xad]+))+"
    slashed = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    ampersand = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    company = (
        rf"(?i:{MONTHS_AND_DAYS}|{STATES}|{COMPANIES_AND_DEGREES}|etc|al|seq|Bldg)"
        rf"|{CAPITALIZED_STATES}|[Pp](?i:p?t)[ye][sS]?"
    )
    return [
        rf"(?P<space>[{SPACES}]+|(?i:&nbsp;))",
        # HTML and XML tags, comments and declarations; character entities of old news wires.
        rf"(?P<verbatim>{tag})",
        r"(&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\#\d+);)",
        # URLs with a scheme, with www, and without either under the common domains.
        rf"(?P<verbatim>(?i:https?://)[^{not_in_url}(){{}}]+[^{not_in_url}.!?(){{}},\-])",
        rf"(?P<verbatim>(?i:www\.)(?:[^{not_in_url}.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path})",
        rf"(?P<verbatim>(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu){path})",
        # E-mail addresses, with or without angle brackets.
        r"(?P<verbatim>(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}\xa0]*@(?:[^ \t\n\f\r\"<>|(){}.\xa0]+\.)*"
        r"[^ \t\n\f\r\"<>|(){}.\xa0]+(?:>|(?i:&gt;))?)",
        # Programming languages; brackets that are already in the form of the Penn Treebank; S&P-500.
        r"((?i:c\+\+|[cf]\#))",
        r"(-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls))",
        # and/or, 24/7
        rf"({slashed}(?:\\?/{slashed}){{1,2}})",
        # Abbreviations. A lone letter before the start of a sentence loses its full stop.
        rf"([A-Za-z])\.{_SPACE}+(?:{SENTENCE_STARTERS}|{tag}){_SPACE}",
        rf"((?i:{BEFORE_NUMBERS})\.){_SPACE}?{_DIGIT}",
        rf"((?i:pt[ey]|co)\.){_SPACE}(?i:ltd|lim)",
        # The lookahead of up to two characters makes this match longer than a match of the rules that drop the full stop.
        rf"((?:{company})\.)(?:.|\n)?(?:.|\n)?",
        rf"((?:(?i:{TITLES})|M(?i:iss)|[A-Za-z])\.)",
        rf"((?:{initials})\.)",
        rf"({initials}){_SPACE}",
        # File names.
        rf"(?P<verbatim>{letter_or_digit}+(?:\.{letter_or_digit}+)*\.(?i:{FILE_SUFFIXES}))(?:{_SPACE}|[.?!,])",
        # Compounds with hyphens, and capitals joined by an ampersand (R&B).
        rf"({compound})",
        rf"({compound}\.)[,;:、]",
        rf"({ampersand}\.)[,;:、]",
        rf"({ampersand})",
    ]


def _number_and_sign_rules() -> list[str]:
    """Return the rules of numbers, money, telephone numbers, quotation marks, brackets, smileys and signs."""
    separator = r"[.:,\xad\u066b\u066c]"
    face = r"[-^x=~<>']"
    return [
        # Dates: 12/31/2015.
        rf"({_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}})",
        # Numbers with groups, decimals, or the colon of a time. Arabic separators too.
        rf"([-+]?(?:{_DIGIT}+(?:{separator}{_DIGIT}+)*|(?:{separator}{_DIGIT}+)+))",
        # Superscripts and subscripts.
        "([⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+))",
        # Fractions, also after a whole number: "3 1/2" is one token.
        rf"((?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}(?:\\?/|⁄){_DIGIT}{{1,4}})",
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
        "(\\.{3,5}|…|\\.(?:[ \xa0]\\.){2,4})",
        # Typographic quotation marks and apostrophes.
        r"(?P<quote>[`‘-‟\x91-\x94‹›«»]{1,2}|'|(?i:&apos;))",
        # Other signs and symbols.
        rf"([&+~^|\\⁄⁺⁻₊₋{SIGNS}])",
    ]

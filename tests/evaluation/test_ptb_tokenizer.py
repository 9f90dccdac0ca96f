"""Tests of the tokenizer: its tokens equal those of Stanford's, recorded and, where Java is installed, live."""

from __future__ import annotations

import random
import unicodedata

import pytest
from sampling import IS_COMPLETE, sample

from llava_simplified.evaluation.ptb_tokenizer import tokenize

from .coco import make_samples, needs_java

# Caption and tokens, recorded from the PTBTokenizer of pycocoevalcap 1.2.
EXPECTED_TOKENS = {
    "In Ark. and Az., Wash. or Mass. they wash. Ore. trains, the Tex. plain, Ill. and ill. men, La. and Del. shops": "in ark. and az. wash. or mass. they wash ore. trains the tex. plain ill. and ill men la. and del. shops",
    "A man's hand, holding two cats' toys.": "a man 's hand holding two cats toys",
    "i can't, won't and don't; they're late - aren't they?": "i ca n't wo n't and do n't they 're late are n't they",
    "author : a life in photography -- in pictures": "author a life in photography in pictures",
    "the - bedroom stone cottage can sleep 3-4 people": "the bedroom stone cottage can sleep 3-4 people",
    "actor attends the premiere at a 1/2 price !": "actor attends the premiere at a 1/2 price",
    "where 's the best place ? right here , of course !": "where 's the best place right here of course",
    "\"Quoted\" 'single' “curly” ‘curly’ ``latex'' «angles»": "quoted single curly curly latex angles",
    "The U.S. flag over Washington, D.C. at 5 p.m. on Oct. 12": "the u.s. flag over washington d.c. at 5 p.m. on oct. 12",
    "Mr. and Mrs. Smith vs. Dr. No, Jr.": "mr. and mrs. smith vs. dr. no jr.",
    "plan b. and vitamin C. A man eats": "plan b. and vitamin c a man eats",
    "I saw e.g. cats, dogs, etc. at St. Mary's": "i saw e.g. cats dogs etc. at st. mary 's",
    "$5, US$20, £3 and €4.50 for 10% off; 7¢": "$ 5 us$ 20 # 3 and $ 4.50 for 10 % off 7 cents",
    "(red) [green] {blue}": "-lrb- red -rrb- -lsb- green -rsb- -lcb- blue -rcb-",
    "no. 5 is no. good; fig. 3, ca. 1900, approx. 20": "no. 5 is no good fig. 3 ca. 1900 approx 20",
    "3 1/2 or 3½ cups at 10:30am, 1,000.50 of 5'10\"": "3\xa01/2 or 3 1/2 cups at 10:30 am 1,000.50 of 5 10",
    "call 555-123-4567 or (555) 123-4567 in 1990-2000": "call 555-123-4567 or -lrb-555-rrb-\xa0123-4567 in 1990-2000",
    "cannot gonna wanna lemme 'tis 'twas y'all o'clock rock 'n' roll": "can not gon na wan na lem me 't is 't was y' all o'clock rock 'n' roll",
    "it’s the ’90s, don’t you know: o’clock, ’tis, y’all": "it 's the ’90s do n't you know o’clock tis y’ all",
    "the '90s, 1980's and '95": "the '90s 1980 's and '95",
    "well-known T-shirt, co-op, e-mail, x-ray -- and/or 24/7": "well-known t-shirt co-op e-mail x-ray and/or 24/7",
    "R&B, AT&T, Q&A &amp; a&b": "r&b at&t q&a & a & b",
    "#love @user #tag_1 #1 foo@bar.com http://www.foo.com/a?b=c. foo.com": "#love @user #tag _ 1 # 1 foo@bar.com http://www.foo.com/a?b=c foo.com",
    "image_01.jpg, IMG 2.png and file.txt": "image_01 jpg img 2.png and file.txt",
    "café naïve straße Ñandú 日本語 हिन्दी абв": "café naïve straße ñandú 日本語 हिन्दी абв",
    "sun ☀ heart ❤ smile 😀 flag 🇺🇸 ™ © 20°": "sun ☀ heart ❤ smile flag ™ © 20 °",
    "wow!!! what?! really... ok.. no....": "wow !!! what ?! really ok no",
    "a . . . b … c – d — e --- f ----- g": "a b c d e f ----- g",
    "* ** # ## @ % ^ & _ = + ~ | \\ / < > <3 :) ;-) :D ^_^": "* ** # ## @ % ^ & _ = + ~ | \\ / < > < 3 :-rrb- ;--rrb- :d ^_^",
    "<b>bold</b> <img src='a b'> &quot;hi&quot; &lt;x&gt; a&nbsp;b": "<b> bold </b> <img\xa0src='a\xa0b'> hi < x > a b",
    "hello.World, hello!there. a.b.c, foo.; x.,": "hello.world hello!there a.b.c foo. x.",
    "soft\xadhyphen zero\u200bwidth no\xa0break": "softhyphen zero width no break",
    "n't 's 're isn'ts ma'am d'Artagnan L'Oréal jack-o'-lantern": "n't 's 're is n'ts ma'am d'artagnan l'oréal jack-o lantern",
    "'quoted words' and the dogs' 'bones'": "quoted words and the dogs bones",
    "pre-war pro- anti- non-U.S. U.S.-based": "pre-war pro- anti- non-u.s. u.s.-based",
    "woman surfing: medium-dark skin tone": "woman surfing medium-dark skin tone",
    "C++ and C# or f#": "c++ and c# or f#",
    "-5 +5 -2.5 .5 5. -LRB- -lrb-": "-5 +5 -2.5 .5 5 -lrb- -lrb-",
    "pty. ltd. and Co. Inc. Ltd. A firm": "pty. ltd. and co. inc. ltd. a firm",
    "an oﬃce ﬂoor, ＮＨＫ の ｶﾒﾗ, ﺍﻟﻌﺮﺑﻴﺔ, １２ ﷼": "an oﬃce ﬂoor ｎｈｋ の ｶﾒﾗ ﺍﻟﻌﺮﺑﻴﺔ １２",
    "newer than the original: Ꟃ ⱟ \u08be \U0001e900, and Ⅷ": "newer than the original and",
    "a· b϶ c՚ d۩ e߶ ⁄ ⁺ ⁻ ₊ ₋ Ⓐ \x82 \x84": "a · b϶ c՚ d۩ e ߶ ⁄ ⁺ ⁻ ₊ ₋ ⓐ",
    "vitamin C. <b>Now</b> vitamin C. <i> now, plan B. And so": "vitamin c. <b> now </b> vitamin c <i> now plan b. and so",
    "plan B. The end, B. A B. A! B. Mr. X, B.\xa0The B. Bob": "plan b the end b a b. a b mr. x b the b. bob",
    "<:) <;( :) ;o) O'o o`O a'o O'D": "<:-rrb- <;-lrb- :-rrb- ;o-rrb- o'o o`o a o o 'd",
    "soft\xadhy\xadphen \xad #soft\xadtag soft\xad.jpg 1\xad2": "softhyphen #soft\xadtag soft\xad.jpg 12",
    "3  1/2 3&nbsp;1/2 a.\xa0. .b . . . . . . . ........": "3 1/2 3 1/2 a. b",
    "http://a.b/c{d} http://a.b/\xa0c http://\U0001f600 www.x.org/a&amp;b": "http://a.b/c -lcb- d -rcb- http://a.b/\xa0c http://\U0001f600 www.x.org/a&amp;b",
    "a.k.a.U.S. ......5U.S. ’１1 ’95 hello.、": "a.k.a.u.s. .5 u.s. １1 ’95 hello. 、",
}

# Random captions are built from these pieces. Each group tests one part of the rules.
PIECES = {
    "abbreviations": "Jan. Inc. no. fig. pt. pty. ltd. co. U.S. U.S e.g. Ill. ill. Mr. A. a.k.a. Ph.D. vs. 5 x The the É "
    "A , ; ? ! \" - 's . <b> ... It 、",
    "signs": ": ; = < > - o * ' ( ) D P d p O \\ { } @ | [ ] a 1 ^ _ ~ x . ` 3 & # % + / ? !",
    "soft hyphens": "\xad a B - 's n't 1 . / # @ _ cat do , US & jpg ' can not \xad",
    "letters": "a B 1 . - ' é 日 ﬃ Ａ １ ， 。 、 😀 🇺 𝐀 \u200d \u0301 ٠ \u2019 … € ½ ² İ ı ſ \u212a \ufeff \u200b Ⓐ Ⅰ ｱ ゛ ـ",
    "apostrophes": "' ’ ` O o a e d l y n t s re x J é 1 9 - . &apos; ll ve m 90s",
    "markup": "A. b. <b> </b> <a <x <!-- --> > The a 3 U.S. Inc. < &lt; &gt; &amp; &apos; &nbsp; &quot; ( ) { } @ @b #a / :",
    "addresses": "http:// https:// www. a . com org .net / \xa0 \u2003 c ? - é { } 😀 @ b x.jpg _ $ 1 \xad ' ! a@b.c",
    "numbers": "1 23 456 7890 - + / ( ) \xa0 . , : \xad ٣ ½ ² $ % # st 's a am 12/31/15 555-1234",
}


@pytest.mark.parametrize("caption", EXPECTED_TOKENS)
def test_tokenize_returns_recorded_tokens(caption: str) -> None:
    assert tokenize(caption) == EXPECTED_TOKENS[caption]


def test_tokenize_treats_line_breaks_as_spaces() -> None:
    assert tokenize("  a cat\n on\ta\r\nmat  ") == "a cat on a mat"
    assert tokenize("") == ""
    assert tokenize(" \n ") == ""


@pytest.mark.medium
def test_tokenize_is_fast_on_hostile_text() -> None:
    """Repeated beginnings of long tokens must not make the regular expressions backtrack for minutes."""
    hostile = [
        "<a " + "b='" * 3000,
        "a-" * 5000,
        "." * 5000,
        "a@" * 3000,
        "&" * 5000,
        "'" * 5000,
        "a.b" * 3000,
    ]
    for text in hostile:
        tokenize(text)


@pytest.mark.parametrize("newline", ["\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_tokenize_treats_every_line_break_as_a_space(newline: str) -> None:
    """The original would begin another caption at the line break, and pair all later captions with the wrong images."""
    assert tokenize(f"a cat{newline}on a mat") == "a cat on a mat"


def test_tokenize_accepts_half_a_surrogate_pair() -> None:
    """JSON can contain half a surrogate pair, but it cannot be passed to the original."""
    assert tokenize("a \ud83d b") == "a b"
    assert tokenize("a \ud83d \U0001f600 #b") == "a #b"


def typical_captions() -> list[str]:
    """Return the recorded captions, their words in another order, and captions like those of COCO."""
    dice = random.Random(1)
    words = sorted({word for caption in EXPECTED_TOKENS for word in caption.split()})
    mixed = [" ".join(dice.choices(words, k=6)) for _ in range(1500)]
    references = [reference for scene in make_samples(200) for reference in scene.references]
    return [*EXPECTED_TOKENS, *mixed, *references]


def random_captions(kind: str) -> list[str]:
    """Return random texts of `PIECES`, with fixed seeds, so that a failure can be repeated.

    The rules were developed with many more texts.
    """
    dice = random.Random(kind)
    pieces = [*PIECES[kind].split(" "), " ", "  "]
    captions = []
    for _ in range(2000 if IS_COMPLETE else 500):
        separator = dice.choice(["", "", " "])
        captions.append(separator.join(dice.choices(pieces, k=dice.randint(1, 8))))
    return captions


def character_captions() -> list[str]:
    """Return every character of Unicode on its own and within a word, without surrogates and line breaks.

    Above the basic plane, only assigned characters are included: the original has no class for any character there.
    `make test` uses all characters of Latin and Greek and all punctuation, and a sample of the others.
    """
    common = [*range(0x400), *range(0x2000, 0x2070), *range(0x3000, 0x3040)]
    basic = sample(range(0x400, 0x10000), 4000)
    others = sample(filter(is_assigned, range(0x10000, 0x110000)), 2000)
    characters = []
    for code in dict.fromkeys([*common, *basic, *others]):
        if not 0xD800 <= code <= 0xDFFF and chr(code) not in "\n\r\x0b\x0c\x85\u2028\u2029":
            characters.append(chr(code))
    return [f"{character} x{character}y 1{character}2" for character in characters]


def is_assigned(code: int) -> bool:
    return unicodedata.category(chr(code)) not in ("Cn", "Co")


@pytest.mark.no_cover  # other tests run the same lines
@pytest.mark.medium
@needs_java
def test_tokenize_equals_the_server_live() -> None:
    """All captions are tokenized in one process, because starting Java takes longer than tokenizing."""
    captions = [*typical_captions(), *character_captions()]
    for kind in PIECES:
        captions += random_captions(kind)
    assert_equal_to_server(captions)


def assert_equal_to_server(captions: list[str]) -> None:
    """Compare with the PTBTokenizer of pycocoevalcap.

    The server reads all captions as one stream, and the tokens of a line can depend on the next line. Therefore a neutral
    line is inserted between any two captions.
    """
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    lines = []
    for caption in captions:
        lines += [caption, "next"]
    as_dict = {number: [{"caption": line}] for number, line in enumerate(lines)}
    server_tokens = ptbtokenizer.PTBTokenizer().tokenize(as_dict)
    wrong = []
    for number, caption in enumerate(captions):
        expected = server_tokens[2 * number][0]
        actual = tokenize(caption)
        if actual != expected:
            wrong.append((caption, expected, actual))
    assert not wrong, f"{len(wrong)} of {len(captions)}, for example {wrong[:3]}"

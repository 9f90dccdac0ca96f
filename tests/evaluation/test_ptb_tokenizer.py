"""Tests of the tokenizer: its tokens equal those of Stanford's, stored ones and, where Java is installed, live ones."""

from __future__ import annotations

import random

import pytest

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
}


@pytest.mark.parametrize("caption", EXPECTED_TOKENS)
def test_tokenize_returns_recorded_tokens(caption: str) -> None:
    assert tokenize(caption) == EXPECTED_TOKENS[caption]


def test_tokenize_treats_line_breaks_as_spaces() -> None:
    assert tokenize("  a cat\n on\ta\r\nmat  ") == "a cat on a mat"
    assert tokenize("") == ""
    assert tokenize(" \n ") == ""


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


@needs_java
def test_tokenize_equals_the_server_live() -> None:
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    dice = random.Random(1)
    words = sorted({word for caption in EXPECTED_TOKENS for word in caption.split()})
    mixed = [" ".join(dice.choices(words, k=6)) for _ in range(1500)]
    references = [reference for sample in make_samples(200) for reference in sample.references]
    captions = [*EXPECTED_TOKENS, *mixed, *references]
    # The server reads all captions as one stream and looks across line ends: put a neutral line between any two.
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
    assert not wrong, wrong[:3]

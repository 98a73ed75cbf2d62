"""Answers as models give them, and worse: seeded strings on which scoring rules are compared with other harnesses."""

import random

TEXT = """
yes no Yes NO not nope the a An one two Ten none isnt it's cat's dont somebody'd 'ow'sat youd've red light-blue and/or
U.S.A. 12:30pm. 1,000 2,500.75 $5.00 14% 0.14 1e3 -3 007 ½ ² \u0663 \uff11\uff12 cat dog Dog. café ÉTÉ \ufb01sh ß İ 日本
😀 don\u2019t \u201cquoted\u201d (B) B b C. A) [D] **B** answer: The answer is \\frac{a}{b}
"""
WORDS = TEXT.split()
JOINTS = [
    " ", " ", " ", " ", "", ", ", ",", ".", ". ", "-", " - ", "/", "\n", "\t", "  ", "?", "!", "; ", "'", "\u00a0",
    "\u2028",
]  # fmt: skip


def answers(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    """`count` strings without white space at the ends, as harnesses strip them; 1 in 40 is empty, 1 in 200 long."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        length = 0 if number % 40 == 0 else 200 if number % 200 == 1 else rng.randint(1, 5)
        text = "".join(rng.choice(words) + rng.choice(JOINTS) for _ in range(length))
        if number % 7 == 0:
            text += rng.choice([".", "..", " .", "." * 40 + "x", "!", ",", " "])
        found.append(rng.choice([text, text, text, text.lower(), text.upper(), text.capitalize()]).strip())
    return found

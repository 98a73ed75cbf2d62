"""Normalises short answers as the evaluation servers of VQA do, so that "Two dogs, isnt it?" equals "2 dogs isn't it".

Source: EvalAIAnswerProcessor of LLaVA 2024-05 (llava/eval/m4c_evaluator.py), the same in lmms-eval 0.2.1, 0.2.3 and
0.7.3 (tasks/_task_utils/vqa_eval_metric.py). The steps are numbered as they are applied:

1 lower-case                          5 signs, each of SIGNS, become spaces or nothing
2 delete every comma and question mark  6 the first 32 periods that no digit follows are deleted
3 "'s" becomes " 's"                   7 number words become digits; a, an and the are dropped
4 line breaks and tabs become spaces   8 known contractions get their apostrophe; single spaces
"""

import functools
import re

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The published rule passes a flag of `re` where the number of periods to delete goes.
_PERIODS = int(re.UNICODE)
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each is meant by the word that lacks one of its apostrophes. One entry of the published list is the other way round.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, char in enumerate(word) if char == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


@functools.lru_cache(maxsize=1 << 16)  # references repeat
def normalise(text: str) -> str:
    """Returns a text after all steps, 1 to 8."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return signs_and_words(one_line(text))


def normalise_lightly(text: str) -> str:
    """Returns a text after the steps 4 to 8: commas, question marks and "'s" are left to them."""
    return signs_and_words(one_line(text))


def one_line(text: str) -> str:
    """Returns a text after step 4, without white space at its ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)
def signs_and_words(text: str) -> str:
    """Returns a text after the steps 5 to 8."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for sign in SIGNS:
        if sign in text:
            # Whether a sign touches a space is asked of the text as it came, not of what the signs before left.
            touches = f"{sign} " in text or f" {sign}" in text
            out = out.replace(sign, "" if touches or number else " ")
    out = _PERIOD.sub("", out, count=_PERIODS)
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

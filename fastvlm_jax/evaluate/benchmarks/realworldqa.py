"""RealWorldQA: questions about photographs, most from cars, with options, a word or a number as the answer."""

from etils import epath

from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import NO_LLAVA, Benchmark, Mark, Protocol, Row, ask_lmms_eval
from fastvlm_jax.evaluate.scores import equality
from fastvlm_jax.evaluate.scores import realworldqa as rules
from fastvlm_jax.text.conversation import Turn

FILES = ("data/test-*.parquet",)


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions, whose text holds the options and a format sentence, from the table of the hub."""
    found = published.find(folder, "data/test-*.parquet", "test-*.parquet")
    if not found:
        raise published.wrong_layout(folder, FILES)
    where = str(found[0].parent)
    rows = []
    for i, row in enumerate(published.read_parquet(found, ("question", "answer"), ("image",))):
        place = f"{where} row {i}"
        question, answer = published.text(row, "question", place), published.text(row, "answer", place)
        kind = "options" if answer.strip().upper() in ("A", "B", "C", "D") else "open"
        rows.append(Row(str(i), question, published.pictures_of([row["image"]]), (answer,), {}, {"kind": kind}))
    return published.check_rows(rows, where)


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation: the question as it was published."""
    return ask_lmms_eval(row, row.question.strip())


def score_0_2(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer by the rule of lmms-eval 0.2.x."""
    parsed = rules.parse_0_2(answer, row.question)
    return Mark(equality.lmms_eval(parsed, row.references[0]), parsed)


def score_0_7(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer by the rule of lmms-eval 0.7.3."""
    reference = row.references[0].strip()
    parsed = rules.parse_0_7(answer, reference)
    return Mark(float(parsed == (reference.upper() if row.groups["kind"] == "options" else reference.lower())), parsed)


BENCHMARKS = (
    Benchmark(
        name="realworldqa",
        title="RealWorldQA",
        read=read,
        protocols=(
            Protocol("paper", "lmms-eval 0.2.2", prompt, score_0_2, 16, rules.RULE_0_2),
            Protocol("lmms-eval", "lmms-eval 0.7.3", prompt, score_0_7, 16, rules.RULE_0_7),
        ),
        metric="accuracy, %",
        size=765,
        files=FILES,
        source="Hugging Face: xai-org/RealworldQA or lmms-lab/RealWorldQA",
        refused=NO_LLAVA,
    ),
)

"""Wrong use of stage 0, and of its config where another belongs: one line that names the key, and nothing written."""

import pytest
from command import fastvlm
from paths import HELPERS
from small_pairs import write_pairs

CONFIG = f"--config={HELPERS / 'small_pairs.py'}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


TAUGHT = ("loss.teachers=((6, 20.0),)", "loss.soft=1.0")


@pytest.mark.parametrize(
    "settings, words",
    [
        (["data.tokenizer=EMPTY"], "no tokenizer in EMPTY: it needs one of"),
        (["model.text.vocab_size=200"], "has 302 ids and model.text.vocab_size is 200; set --config.model.text.vocab"),
        (["model.text.num_heads=5"], "width=32 of the text tower must be a multiple of num_heads=5"),
        (["model.vision.head_features=10"], "model.vision.head_features=10 must be 12"),
        (["data.groups=64"], "64 x data.images_per_group=4 = 256 pairs is larger than the 80 records of an epoch"),
        (["data.groups=16"], "the validation split: a batch of data.groups=16"),
        (["data.path=EASY", "model.text.vocab_size=2000"], "questions are no caption. Nor can the 100 records behind"),
        (["data.image_size=9"], "data.image_size=9: image size 9x9 must be a multiple of 4"),
        (["mesh=(1,-1,1,2)"], "mesh: the towers of stage 0 are not split along tensor"),
        (["data.groups=6"], "data.groups=6 does not divide over 8 data shards; make it a multiple of 8"),
        (["data.groups=16", "accumulate=2", "model.vision.batch_norm_images=8"], "make data.images_per_group=4 a mul"),
        (["model.vision.batch_norm_images=5"], "batch_norm_images=5 does not divide the batch of 8 x 4 = 32 images"),
        (["data.texts=2"], "no synthetic captions, which data.texts=2 asks for"),
        (["data.augment=replay"], "no augmentation (param_aug), which data.augment='replay' asks for"),
        (TAUGHT[:1], "contradict each other: distillation needs both a weight and teachers"),
        (TAUGHT, "data.augment='random': loss.teachers saw crops that the records store"),
        (["decayed=('krenel',)"], "decayed=('krenel',) names no parameter, though groups ask for weight decay"),
        (["decayed=(1,)"], "decayed=(1,) must hold last parts of paths"),
        (["parent=llm=LLM"], "holds llm, of which this stage has nothing: give one with text or vision"),
    ],
    ids=lambda x: x[-1].partition("=")[0] if isinstance(x, list | tuple) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    monkeypatch, capsys, data, easy_vqa, language_model, tmp_path, settings, words
):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "EASY": str(easy_vqa), "LLM": str(language_model)}
    for name, place in places.items():
        settings, words = [text.replace(name, place) for text in settings], words.replace(name, place)
    flags = [f"--config.{text}" for text in settings]
    status, out, err = fastvlm(
        monkeypatch, capsys, "train", f"{CONFIG}:{data}", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, sentencepiece_file):
    """A language model alone, of random weights."""
    import jax
    import numpy as np

    from fastvlm_jax import convert
    from fastvlm_jax.models import kinds
    from fastvlm_jax.processor import Processor
    from fastvlm_jax.text.tokenizer import load_tokenizer

    sizes = dict(width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=24, vocab_size=448)
    config = {"vision": None, "llm": sizes, "dtype": "float32"}
    shapes = kinds.abstract_variables(kinds.build(**config))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    folder = tmp_path_factory.mktemp("lm") / "lm"
    processor = Processor(load_tokenizer(sentencepiece_file), "chatml", 0, 0)
    convert.write(folder, "native", variables, config, processor, {})
    return folder


@pytest.mark.parametrize(
    "command, status, words",
    [
        (["bench", "ttft"], 1, "of stage 0, whose model begins no answer"),
        (["bench", "step"], 1, "of stage 0, whose parts are not timed here"),
        (["data", "inspect", "--output=OUT"], 1, "of stage 0, whose pairs this page does not show"),
        (["sweep", "--workdir=OUT"], 1, "holds no points of a sweep: give a grid"),
        (["preflight", "--topology=gpu:80GB", "--mode=generate"], 2, "--mode needs a compiler"),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "",
)
def test_commands_for_other_stages_refuse_its_config(monkeypatch, capsys, data, tmp_path, command, status, words):
    command = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    found, out, err = fastvlm(monkeypatch, capsys, *command, f"{CONFIG}:{data}")
    assert (found, out) == (status, "") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()

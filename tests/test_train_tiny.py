"""The training example end to end, at a size that a CPU trains in seconds."""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrope

SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny.py"
SIZES = "--steps 24 --finetune-steps 4 --batch 16 --every 8 --dtype float32 "
SIZES += "--vocab 300 --hidden 32 --layers 1 --context 16 --condense 2"


def import_script() -> ModuleType:
    """Import examples/train_tiny.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_book(seed: int, paragraphs: int) -> str:
    """Sentences of few words, hard-wrapped, with emphasis: easy to learn."""
    rng = random.Random(seed)
    words = ["the", "cat", "saw", "a", "dog", "and", "_ran_", "home", "again"]
    lines = (" ".join(rng.choices(words, k=8)) for _ in range(2 * paragraphs))
    pairs = zip(lines, lines, strict=True)
    return "\n\n".join(f"{first}\n{second}." for first, second in pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny`, with `tiny-condensed-2` beside it, made by the script."""
    folder = tmp_path_factory.mktemp("train")
    book, unseen = folder / "book.txt", folder / "unseen.txt"
    book.write_text(make_book(0, 300), encoding="utf-8")
    unseen.write_text(make_book(1, 40), encoding="utf-8")
    texts = ["--text", str(book), "--held-out", str(unseen)]
    about = ["--about", "Nine words."]
    out = folder / "tiny"
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int and float
        import_script().main([str(out), *texts, *about, *SIZES.split()])
    return out


@pytest.fixture
def stretched(trained: Path) -> Path:
    """The condensed folder."""
    return trained.with_name("tiny-condensed-2")


def test_loss_falls(trained: Path) -> None:
    """Held-out loss too, and the tuned model goes on from where the base ended."""
    first, *_, last = json.loads((trained / "metrics.json").read_text())["history"]
    assert last["step"] == 24
    assert last["loss"] < first["loss"] - 0.3
    assert last["held_out"] < first["held_out"] - 0.3


def test_saved_model_scores_as_measured(trained: Path, stretched: Path) -> None:
    """metrics.json is what the folders give, by context."""
    script = import_script()
    text = script.clean((trained.parent / "unseen.txt").read_text(encoding="utf-8"))
    tokenizer = script.Tokenizer.from_file(str(trained / "tokenizer.json"))
    report = np.array_split(script.encode(tokenizer, [text]), 2)[1]
    params, config = jrope.load(stretched, dtype="float32")
    assert config.rope.condense == 2
    assert config.max_position_embeddings == 16
    rows = json.loads((stretched / "metrics.json").read_text())["nats"]
    assert {*rows} == {"base", "base, condense 2", "tuned, condense 2"}
    assert {*rows["base"]} == {"16", "32"}
    got = script.nats(params, report, 32, config)
    np.testing.assert_allclose(rows["tuned, condense 2"]["32"], got, rtol=1e-5)
    assert got < np.log(config.vocab_size)


@pytest.mark.parametrize(("name", "window"), [("tiny", 16), ("tiny-condensed-2", 32)])
def test_hard_line_breaks_are_measured(trained: Path, name: str, window: int) -> None:
    """The held-out file as it is, beside the reflowed text that the table is of."""
    script, folder = import_script(), trained.with_name(name)
    text = (trained.parent / "unseen.txt").read_text(encoding="utf-8")
    tokenizer = script.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw = np.array_split(script.encode(tokenizer, [text]), 2)[1]
    params, config = jrope.load(folder, dtype="float32")
    want = script.nats(params, raw, window, config)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["hard_wrapped"] == {str(window): pytest.approx(want, rel=1e-5)}
    assert want > metrics["nats"]["base"]["16"] + 0.1
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    assert f"reads {np.exp(want):.1f} in windows of {window}: reflow" in card


@pytest.mark.parametrize("name", ["tiny", "tiny-condensed-2"])
def test_folders_load_in_transformers(trained: Path, name: str) -> None:
    """Tokenizer, configuration and weights: the same ids and logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = trained.with_name(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the dog saw\na cat again and again, and home and home and home again."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert len(ids) > 16
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits.numpy()
    params, config = jrope.load(folder, dtype="float32")
    got, _ = jrope.forward(params, jnp.asarray([ids], jnp.int32), config=config)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_card_names_files_not_folders(trained: Path, stretched: Path) -> None:
    """The cards tell what was done, without the paths of the machine."""
    for folder in (trained, stretched):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert str(trained.parent) not in card
        assert "tiny --text book.txt --held-out unseen.txt" in card
        assert "Nine words. Trained on book.txt; held out: unseen.txt" in card
    assert "divided by 2" in card


def test_clean_unwraps_paragraphs() -> None:
    """Hard line breaks, emphasis, ornaments and the publisher's frame go."""
    text = "Frame\n*** START OF THE BOOK ***\n\nIt _was_\n  so.\n\n * * *\n\nEnd.\n\n"
    text += "[A note]\n\n*** END OF THE BOOK ***\nmore"
    assert import_script().clean(text) == "It was so.\nEnd."


def test_refuses_what_would_waste_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing folder and too little text are named before any training."""
    main = import_script().main
    book = tmp_path / "book.txt"
    book.write_text("Too short.", encoding="utf-8")
    texts = ["--text", str(book), "--held-out", str(book)]
    with pytest.raises(SystemExit):
        main([str(trained), *texts])
    assert "exists: remove it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="want at least 2048 and 4096"):
        main([str(tmp_path / "new"), *texts])

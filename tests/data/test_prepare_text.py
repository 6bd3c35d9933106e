"""The command line, any text files, and Python's own text."""

from __future__ import annotations

import gzip
import inspect
import json
import sysconfig
import zipfile
from pathlib import Path

import pytest
import sentencepiece

from data_prep import embedded
from data_prep.__main__ import main
from data_prep.docstrings import honest, library_docstrings, source_files
from data_prep.embedded import topics_text
from s2moe.data import Corpus, CorpusError, SentencePieceTokenizer

BOOK = "".join(f"Line {n} of a long book, with an é and a 日 in it.\n" for n in range(400))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


def prepare(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def whole(corpus: Corpus) -> str:
    return b"".join(corpus.text_bytes(name) for name in ("train", "valid", "test")).decode()


@pytest.mark.parametrize(
    "tokenizer", [["byte"], ["character"], ["sentencepiece", "--vocab-size", "320"]], ids=lambda words: words[0]
)
def test_every_tokenizer_keeps_the_text(tmp_path: Path, book: Path, tokenizer: list[str]) -> None:
    assert prepare("text", "--source", book, "--tokenizer", *tokenizer, "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert whole(corpus) == BOOK
    unit = len if tokenizer != ["byte"] else lambda text: len(text.encode())
    for name, split in corpus.metadata.splits.items():
        assert split.symbols == unit(corpus.text_bytes(name).decode())
    assert corpus.metadata.splits["valid"].symbols == pytest.approx(unit(BOOK) / 20, abs=2)
    assert corpus.metadata.command.startswith("python -m data_prep text --source")


def test_the_characters_of_the_held_out_text_are_known(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a" * 97 + "bc!")
    assert prepare("text", "--source", tmp_path / "t.txt", "--tokenizer", "character", "--out", tmp_path / "o") == 0
    assert Corpus.open(tmp_path / "o").text_bytes("test") == b"aabc!"


def test_subwords_are_learnt_from_the_training_split_only(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(BOOK + "zebra zebra\n" * 160)
    out = tmp_path / "o"
    arguments = ["--tokenizer", "sentencepiece", "--vocab-size", 320, "--fractions", 0.9, 0.09, 0.01, "--out", out]
    assert prepare("text", "--source", tmp_path / "t.txt", *arguments) == 0
    tokenizer = Corpus.open(out).tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert processor.piece_to_id("L") != processor.unk_id()
    assert processor.piece_to_id("z") == processor.unk_id()  # a byte piece stands for it


def test_a_given_subword_model(tmp_path: Path, book: Path) -> None:
    SentencePieceTokenizer.train([BOOK], 320).save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    given = ["--tokenizer", "sentencepiece", "--sentencepiece-model", model]
    assert prepare("text", "--source", book, *given, "--out", tmp_path / "out") == 0
    assert Corpus.open(tmp_path / "out").metadata.vocab_size == 320


def test_json_lines_globs_and_archives(tmp_path: Path) -> None:
    rows = [json.dumps({"body": f"text {n} é \ud83d\ude00\n"}) for n in range(50)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows[:20]) + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[20:]))
    with zipfile.ZipFile(tmp_path / "c.txt.zip", "w") as archive:
        archive.writestr("inside", "no line end")
    (tmp_path / "d.txt").write_text("end\n")
    sources = [tmp_path / "*.jsonl*", tmp_path / "c.txt.zip", tmp_path / "?.txt"]
    assert prepare("text", "--source", *sources, "--field", "body", "--out", tmp_path / "out") == 0
    texts = [f"text {n} é \U0001f600\n\n" for n in [*range(20, 50), *range(20)]]
    assert whole(Corpus.open(tmp_path / "out")) == "".join(texts) + "no line end\nend\n"


def test_half_a_surrogate_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 60 + '\\ud83d"}\n')
    assert prepare("text", "--source", tmp_path / "a.jsonl", "--out", tmp_path / "out") == 0
    assert whole(Corpus.open(tmp_path / "out")) == "x" * 60 + "\ufffd\n\n"


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(100))
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    assert prepare("text", "--dataset", tmp_path / "set", "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    assert whole(corpus) == "".join(f"document {n}\n\n" for n in range(100))


def test_a_second_run_does_nothing_and_says_so(tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare("text", "--source", book, "--out", out) == 0
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [out, *out.iterdir()]}
    capsys.readouterr()
    assert prepare("text", "--source", book, "--out", out) == 0
    assert "already prepared" in capsys.readouterr().out
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [out, *out.iterdir()]}


def test_other_arguments_or_damage_ask_for_force(
    tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare("text", "--source", book, "--out", out) == 0
    assert prepare("text", "--source", book, "--tokenizer", "character", "--out", out) == 2
    assert "tokenizer 'byte' there, 'character' here" in capsys.readouterr().err
    assert prepare("text", "--source", book, "--tokenizer", "character", "--out", out, "--force") == 0
    assert Corpus.open(out).metadata.tokenizer == "character"
    assert "--force" not in Corpus.open(out).metadata.command
    (out / "train.bin").write_bytes(b"")
    assert prepare("text", "--source", book, "--tokenizer", "character", "--out", out) == 2
    assert "damaged: train.bin has 0 bytes" in capsys.readouterr().err
    assert prepare("text", "--source", book, "--tokenizer", "character", "--out", out, "--force") == 0
    assert whole(Corpus.open(out)) == BOOK


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["text", "--source", "absent*.txt"], "no file matches absent"),
        (["text", "--source", "{tmp}"], "give a glob in quotes"),
        (["text", "--source", "{tmp}/bad.jsonl"], "bad.jsonl:2 is not a JSON object"),
        (["text", "--source", "{tmp}/ok.jsonl"], "has no field 'text' (its fields: body, n)"),
        (["text", "--source", "{tmp}/ok.jsonl", "--field", "n"], "field 'n'"),
        (["text", "--source", "{tmp}/raw.txt", "--tokenizer", "character"], "not UTF-8"),
        (["text", "--source", "{tmp}/tiny.txt"], "split empty"),
        (["text", "--source", "{tmp}/raw.txt", "--vocab-size", "300"], "do not apply to the byte"),
        (["text", "--source", "{tmp}/raw.txt", "--fractions", "0.5", "0.5", "0.5"], "sum to 1"),
        (["text", "--source", "{tmp}/raw.txt", "--config", "x"], "belong to --dataset"),
        (["text", "--source", "{tmp}/raw.txt", "--out", "{tmp}"], "is not a corpus"),
        (["enwik8", "--source", "{tmp}/raw.txt"], "enwik8 has 100,000,000"),
        (["text8", "--source", "{tmp}/raw.txt", "--allow-partial"], "too few"),
        (["wikitext103", "--source", "{tmp}/raw.txt"], "is neither wikitext-103-v1.zip nor"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "ok.jsonl").write_text('{"body": "a", "n": 1}\n')
    (tmp_path / "raw.txt").write_bytes(b"\xff" * 100)
    (tmp_path / "tiny.txt").write_text("ab")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "o")]
    assert main([*given, *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert problem in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["enwik9"], ["enwik8"], ["enwik8", "--out", "x", "--nonsense"]])
def test_a_wrong_command_line_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--help" in error


@pytest.mark.parametrize("corpus", [[], ["text8"], ["enwik8"], ["wikitext103"], ["text"], ["embedded"]])
def test_help_shows_examples(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*corpus, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 110


def test_embedded_is_pythons_language_reference(tmp_path: Path) -> None:
    assert prepare("embedded", "--out", tmp_path / "out") == 0
    corpus = Corpus.open(tmp_path / "out")
    text = topics_text()
    assert whole(corpus) == text.decode()
    assert b'The "try" statement' in text
    for name, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
        assert len(corpus.text_bytes(name)) == pytest.approx(share * len(text), abs=4)
    assert corpus.metadata.source["python"].startswith("3.")
    assert len(corpus.metadata.source["sha256"]) == 64


def test_embedded_docstrings_add_to_the_front_of_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(json.__file__).parent  # a small part of the library, to be quick
    monkeypatch.setattr(embedded, "library_docstrings", lambda: library_docstrings(package))
    assert prepare("embedded", "--out", tmp_path / "plain") == 0
    assert prepare("embedded", "--docstrings", "--out", tmp_path / "more") == 0
    plain, more = Corpus.open(tmp_path / "plain"), Corpus.open(tmp_path / "more")
    assert plain.metadata.splits["valid"] == more.metadata.splits["valid"]
    assert plain.metadata.splits["test"] == more.metadata.splits["test"]
    training, reference = more.text_bytes("train"), plain.text_bytes("train")
    assert training.endswith(b"\n\n" + reference)
    assert inspect.getdoc(json.loads).encode() in training[: -len(reference)]
    assert more.metadata.source["docstrings"]["bytes"] == len(training) - len(reference)


def test_the_standard_library_is_found() -> None:
    files = {path.name for path in source_files(Path(sysconfig.get_path("stdlib")))}
    assert {"ast.py", "argparse.py", "encoder.py"} <= files
    assert "test_ast.py" not in files
    assert "topics.py" not in files


def test_docstrings_are_read_in_order_without_importing(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "b.py").write_text(
        'raise SystemExit\nclass C:\n    "C."\n    def f(self):\n        """f.\n\n        more"""\n'
    )
    (tmp_path / "a.py").write_text('"a."\nasync def g():\n    "g."\n')
    (tmp_path / "sub" / "wrong.py").write_text("def")
    (tmp_path / "sub" / "d.py").write_text('"d."')
    (tmp_path / "test" / "t.py").write_text('"excluded"')
    assert list(library_docstrings(tmp_path)) == ["a.", "g.", "C.", "f.\n\nmore", "d."]


def test_docstrings_that_share_a_long_line_with_the_held_out_text_are_dropped() -> None:
    line = "this line is certainly longer than the fifty characters that count"
    held_out = f"before\n   {line}\nwhich continues here and goes on for quite a few more words\nshort line\n"
    kept = [
        "short line",  # shared, but not long
        "a docstring of its own with one line that is longer than fifty characters",
    ]
    dropped = [
        f"Says {line} in a longer line.",  # a held-out line occurs in the docstring
        "First.\n\n    longer than the fifty characters that count which continues here\n",  # across a line break
    ]
    assert list(honest([*kept, *dropped, *kept], held_out)) == kept


def test_a_library_error_says_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("text", "--dataset", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "cannot load the data set" in capsys.readouterr().err
    with pytest.raises(CorpusError):
        Corpus.open(tmp_path / "out")


def test_changed_sources_are_noticed(tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("text", "--source", book, "--out", tmp_path / "out")
    assert prepare(*arguments) == 0
    assert prepare(*arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    book.write_text(BOOK + "One more line.\n")
    assert prepare(*arguments) == 2
    assert "holds another corpus (files '1 of " in capsys.readouterr().err
    assert prepare(*arguments, "--force") == 0
    assert "One more line." in whole(Corpus.open(tmp_path / "out"))

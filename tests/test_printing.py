"""Names that others chose, printed: nothing in them reaches the terminal or a page as a command or as markup."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import PIL.Image
import pytest
import timm
from typer.testing import CliRunner

import cn_hf
import cn_hf.models
from cn_hf.cli import app
from cn_hf.evaluation import markdown_table
from cn_hf.hub.card import checkpoint_card
from cn_hf.printing import as_code, for_markdown, for_terminal

ESCAPE, SURROGATE, OVERRIDE = "\x1b]0;owned\x07", "\udcff", "\u202egnp.exe"
HOSTILE = [f"day{ESCAPE}", f"a\nb\r{SURROGATE}", f"<img src=x onerror=y>|`c`{OVERRIDE}\x9b2J\u2028d"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


def patched(names: list[str]) -> cn_hf.patching.RoutedModel:
    model = timm.create_model("cn_cifar_convnet", num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batch norms that never saw data
        return cn_hf.patch_model(model, mode="cn-channels", where="input", context_names=names).eval()


def test_for_terminal():
    for name in HOSTILE:
        shown = for_terminal(name)
        assert not CONTROL.search(shown)
        assert "\n" not in shown
        shown.encode()
    assert for_terminal("\x1b[31m\n") == r"\x1b[31m\n"
    for plain in ("day", "coarse_label", "été 夜 👩‍🚀", r"a\new", "a | b <c>"):
        assert for_terminal(plain) == plain


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("coarse_label", "coarse_label"), ("_a_", r"\_a\_"), ("a|b", r"a\|b"), ("<b>", "&lt;b&gt;"),
        ("[x](http://y)", r"\[x\](http&#58;//y)"), ("a\nb", r"a\\nb"), ("**x**", r"\*\*x\*\*"), ("&lt;", "&amp;lt;"),
    ],
)  # fmt: skip
def test_for_markdown(name, shown):
    assert for_markdown(name) == shown


def test_as_code():
    assert as_code("day") == "`day`"
    assert as_code("a`b``c") == "``` a`b``c ```"
    assert as_code("a\n\n<b>") == r"`a\n\n<b>`"


def test_a_cell_stays_in_its_place():
    lines = markdown_table([for_markdown(name) for name in HOSTILE], [HOSTILE]).splitlines()
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert not CONTROL.search("".join(lines))


def test_commands_and_cards_show_hostile_names_harmlessly(tmp_path):
    model = patched(HOSTILE)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": HOSTILE}
    folder = cn_hf.save_pretrained(model, tmp_path / "model")
    picture = Path(tmp_path / f"p{ESCAPE}\n.png")
    PIL.Image.new("RGB", (8, 8)).save(picture)
    for arguments in (["inspect", folder], ["predict", folder, picture, "--all-contexts", "--no-progress"]):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.exception
        assert r"day\x1b]0;owned\x07" in done.stdout
        assert not CONTROL.search(done.stdout)
    assert len(done.stdout.splitlines()) == 4
    card = str(checkpoint_card(model, "me/model"))
    card.encode()
    assert not CONTROL.search(card)
    assert "<img" not in re.sub(r"(`+).*?\1", "", card)


def test_an_error_is_one_harmless_message(tmp_path, capsys, monkeypatch):
    from cn_hf.cli import main

    monkeypatch.setattr("sys.argv", ["cn-hf", "predict", str(tmp_path / "no"), f"{tmp_path}/{ESCAPE}*.png"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert not CONTROL.search(message)
    monkeypatch.setattr("sys.argv", ["cn-hf", "predict", "--nonsense"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1

"""Texts and paths of users are printed as they are: square brackets are no markup of rich."""

from __future__ import annotations

import pytest
from rich.text import Text

from stdit.cli.common.tables import print_table
from stdit.cli.main import app, run_command
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.io import save_vae


def test_a_table_shows_brackets_and_is_left_out_if_empty(capsys):
    print_table("in [/b]", ("", "n"), [("[red]x", Text("[0]", "bold"))], right=(1,))
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("in [/b]", "[red]x", "[0]"))
    print_table("nothing", ("n",), [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["inspect IN", "inspect IN --verify", "convert IN OUT"])
def test_a_path_with_brackets(command, tmp_path, monkeypatch, capsys):
    vae = CausalVAE(VaeConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=2))
    save_vae(vae, tmp_path / "[" / "b]")  # "[/b]" would end a style
    monkeypatch.chdir(tmp_path)
    words = [{"IN": "[/b]", "OUT": "[/b]2"}.get(word, word) for word in command.split()]
    assert run_command(app, ["weights", *words], prog="stdit") == 0
    printed = capsys.readouterr()
    assert "[/b]" in printed.out + printed.err

"""Outputs are whole or not there, and nothing else is harmed."""

import os
import pathlib

import pytest

from embgemma import outputs
from embgemma.errors import DataError


def _make(target: pathlib.Path, content: str = "new") -> None:
  with outputs.new_directory(target) as directory:
    (directory / "config.json").write_text(content)
    (directory / "model.safetensors").write_bytes(b"")


def _interrupted(target: pathlib.Path) -> None:
  with outputs.new_directory(target) as directory:
    (directory / "config.json").write_text("half")
    raise RuntimeError


def test_new_directory(tmp_path):
  target = tmp_path / "a" / "model"
  with pytest.raises(RuntimeError):
    _interrupted(target)
  assert not list((tmp_path / "a").iterdir())
  _make(target)
  with pytest.raises(RuntimeError):
    _interrupted(target)
  assert (target / "config.json").read_text() == "new"
  _make(target, "newer")
  assert (target / "config.json").read_text() == "newer"
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["empty", "link", "."])
def test_an_empty_directory_is_filled(tmp_path, monkeypatch, name):
  empty = tmp_path / "empty"
  empty.mkdir()
  inode = empty.stat().st_ino
  (tmp_path / "link").symlink_to(empty)
  monkeypatch.chdir(empty if name == "." else tmp_path)
  outputs.check_directory(pathlib.Path(name), False, tmp_path / "source")
  with pytest.raises(RuntimeError):
    _interrupted(pathlib.Path(name))
  assert not list(empty.iterdir())
  _make(pathlib.Path(name))
  assert empty.stat().st_ino == inode
  assert {p.name for p in empty.iterdir()} == {"config.json", "model.safetensors"}
  assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_deleted(tmp_path, overwrite):
  def refused(path, message, source="elsewhere"):
    with pytest.raises(DataError, match=message):
      outputs.check_directory(path, overwrite, source)

  letters = tmp_path / "letters"
  letters.mkdir()
  (letters / "config.json").write_text("{}")
  (letters / "to_mother.txt").write_text("dear")
  refused(letters, "something else" if overwrite else "--overwrite")
  refused(letters / "to_mother.txt", "is a file")
  model = tmp_path / "model"
  _make(model)
  refused(model, "holds what is read", source=model)
  refused(model, "holds what is read", source=model / "checkpoints" / "3")
  (tmp_path / "link").symlink_to(model)
  refused(tmp_path / "link", "holds what is read", source=model)
  if overwrite:
    outputs.check_directory(model, overwrite, "elsewhere")
  else:
    refused(model, "exists already.*--overwrite")


def test_new_file(tmp_path):
  path = tmp_path / "a" / "file"
  with outputs.new_file(path) as file:
    file.write(b"1")
  assert path.read_bytes() == b"1"
  assert path.stat().st_mode & 0o777 == 0o644
  with pytest.raises(DataError, match="exists already"):
    outputs.check_file(path, overwrite=False)
  outputs.check_file(path, overwrite=True)
  with pytest.raises(DataError, match="is a directory"):
    outputs.check_file(path.parent, overwrite=True)


def test_no_place_to_write(tmp_path):
  (tmp_path / "file").write_text("")
  for make in (outputs.new_directory, outputs.new_file, outputs.new_path):
    with (
      pytest.raises(DataError, match="cannot be written.*nothing was changed"),
      make(tmp_path / "file" / "below"),
    ):
      pass
  assert os.listdir(tmp_path) == ["file"]

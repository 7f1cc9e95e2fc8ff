"""What a number's row calls a model or a file."""

from pathlib import Path

from flora.names import PROJECT, last_part, public_name


def test_no_folder_of_this_machine_is_named(tmp_path, monkeypatch):
    inside = PROJECT / "assets" / "models"
    assert public_name(inside) == public_name(str(inside)) == "assets/models"
    assert public_name("openai/whisper-tiny") == "openai/whisper-tiny" and public_name("lua") == "lua"
    assert public_name(tmp_path / "own" / "model") == "own/model" == public_name("../own/model") == public_name("~/own/model")
    monkeypatch.chdir(tmp_path)
    assert public_name(tmp_path / "a" / "b" / "c") == "a/b/c"
    assert public_name(Path(tmp_path.anchor, "secret", "own", "clips")) == "own/clips"


def test_a_path_is_called_by_its_last_part_and_a_hub_id_by_all(tmp_path, monkeypatch):
    (tmp_path / "owner" / "voice").mkdir(parents=True)
    assert last_part(str(tmp_path / "owner" / "voice")) == "voice" and last_part("owner/voice") == "owner/voice"
    monkeypatch.chdir(tmp_path)
    assert last_part("owner/voice") == "voice", "it is here"

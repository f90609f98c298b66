"""Where a checkpoint is looked for: a folder, the cache, the hub; and what is said, at once, where it is in none."""

import time

import pytest
from huggingface_hub import constants

from siglip2_packed import SigLip2NaflexVisionTower, Siglip2PackedImageProcessor, Siglip2PackedVisionModel, files

LOADERS = pytest.mark.parametrize(
    "load",
    [
        Siglip2PackedVisionModel.from_pretrained,
        Siglip2PackedImageProcessor.from_pretrained,
        SigLip2NaflexVisionTower,
    ],
    ids=["model", "processor", "tower"],
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files._answers.cache_clear()
    yield tmp_path / "cache"
    files._answers.cache_clear()


@pytest.fixture
def unreachable(cache, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "get_session", Session)
    monkeypatch.setattr(files, "cached_file", lambda *args, **kwargs: pytest.fail("the hub was asked for a file"))
    return asked


@LOADERS
@pytest.mark.parametrize("name", ["nobody/nothing", "so400m", "checkpoints/so400m"])
def test_a_name_that_is_nowhere_is_told_at_once(unreachable, cache, load, name):
    begin = time.monotonic()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=rf"no folder '{name}' here.* not in the cache .*cannot be reached"):
            load(name)
    assert time.monotonic() - begin < 5
    assert len(unreachable) <= 2  # once a minute, not once a file


@LOADERS
def test_offline_nothing_is_asked(cache, monkeypatch, load):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(files, "get_session", lambda: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing' here.* not in the cache.*HF_HUB_OFFLINE"):
        load("nobody/nothing")


@LOADERS
@pytest.mark.parametrize("name", ["my checkpoint", "a..b", "--x"])
def test_what_cannot_be_a_hub_id_is_told_so(cache, load, name):
    with pytest.raises(FileNotFoundError, match=f"no folder '{name}' here, and a hub id cannot look so"):
        load(name)


def test_a_file_is_not_a_folder(checkpoint):
    with pytest.raises(FileNotFoundError, match="model.safetensors' is a file: give the folder that it is in"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny") / "model.safetensors")


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_in_the_cache_is_read_without_the_hub(checkpoint, cache, monkeypatch, offline):
    class Session:
        def head(self, url, timeout):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(files, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    snapshot = cache / "models--me--tower" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--me--tower" / "refs").mkdir()
    (cache / "models--me--tower" / "refs" / "main").write_text("0" * 40)
    for file in checkpoint("tiny").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    model = Siglip2PackedVisionModel.from_pretrained("me/tower", cache_dir=str(cache))
    assert model.config.hidden_size == 64
    assert Siglip2PackedImageProcessor.from_pretrained("me/tower", cache_dir=str(cache)).patch_size == 4


def test_a_hub_behind_a_proxy_of_the_call_is_asked_through_it(unreachable, monkeypatch, checkpoint):
    asked = []

    def cached_file(ckpt, name, **hub):
        asked.append((name, hub.get("proxies"), hub.get("local_files_only")))
        return str(checkpoint("tiny") / name)

    monkeypatch.setattr(files, "cached_file", cached_file)
    found = files.find_file("some/model", "config.json", proxies={"https": "proxy:3128"})
    assert found == checkpoint("tiny") / "config.json"
    assert asked == [("config.json", {"https": "proxy:3128"}, None)] and not unreachable

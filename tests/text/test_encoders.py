from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
from references import small_reason
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5EncoderModel,
)

from stdit.errors import StditError
from stdit.text import loading
from stdit.text.encoders import TextEncoder
from stdit.text.images import load_image_encoder
from stdit.text.lengths import TextLimit
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.weights.families import treatment_of


def load_text_encoder(folder, **options):
    """With the treatment of the folder's pipeline, as every command loads it."""
    return loading.load_text_encoder(folder, treatment_of(folder), **options)


CAPTIONS = ["A red circle moves left, slowly.", "a blue square moves right", "A small green triangle moves up"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = build_word_tokenizer(CAPTIONS)
    return TextEncoder(small_umt5(len(tokenizer), 32, 2, 4), tokenizer, max_length=16)


def test_words_are_tokens_and_the_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = build_word_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "A  BLUE circle, moves sideways."
    for one in (tokenizer, again):
        ids = one(text).input_ids
        assert one.convert_ids_to_tokens(ids) == ["a", "blue", "circle", ",", "moves", "<unk>", ".", "</s>"]
        assert one("").input_ids == [1]
        assert (one.pad_token_id, one.eos_token_id, one.unk_token_id) == (0, 1, 2)
        padded = one([text, ""], padding="max_length", max_length=10, truncation=True)
        assert padded.attention_mask == [[1] * 8 + [0] * 2, [1] + [0] * 9]
        assert one(text, truncation=True, max_length=3).input_ids[-1] == 1  # the end survives the cut


def test_the_vocabulary_does_not_depend_on_the_order_of_captions():
    assert build_word_tokenizer(CAPTIONS).get_vocab() == build_word_tokenizer(CAPTIONS[::-1]).get_vocab()


def test_a_batch_equals_each_text_alone(encoder):
    texts = [*CAPTIONS, "", "a"]
    together = encoder.encode(texts)
    assert [len(one) for one in together] == [len(ids) for ids in encoder.tokenize(texts)]
    for text, found in zip(texts, together):
        torch.testing.assert_close(found, encoder.encode([text])[0], rtol=1e-5, atol=1e-6)
    assert encoder.encode([]) == []


def test_agrees_with_wan_pipeline_before_padding(encoder):
    from diffusers import WanPipeline

    wan = WanPipeline.__new__(WanPipeline)
    wan.tokenizer, wan.text_encoder = encoder.tokenizer, encoder.encoder
    with torch.no_grad():
        theirs = wan._get_t5_prompt_embeds(list(CAPTIONS), max_sequence_length=16, device=torch.device("cpu"))
    for ours, row in zip(encoder.encode(CAPTIONS), theirs):
        torch.testing.assert_close(ours, row[: len(ours)], rtol=1e-5, atol=1e-6)
        assert not row[len(ours) :].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_reason_is_asked_as_cosmos_pipeline_asks_it(side, tmp_path):
    from diffusers import Cosmos2_5_PredictBasePipeline

    model, tokenizer = small_reason(CAPTIONS)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    model.save_pretrained(tmp_path / "text_encoder"), tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path, max_length=40)
    theirs = Cosmos2_5_PredictBasePipeline.__new__(Cosmos2_5_PredictBasePipeline)
    theirs.tokenizer, theirs.text_encoder = tokenizer, model
    texts = [*CAPTIONS, "", " ".join(CAPTIONS * 3)]  # the last is cut
    with torch.no_grad():
        wanted = theirs._get_prompt_embeds(texts, max_sequence_length=40, device=torch.device("cpu"))
    found = encoder.encode(texts)
    assert [len(ids) for ids in encoder.tokenize(texts)] == [40] * 5 and encoder.dim == 32
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], encoder.encode(texts[1:2])[0], rtol=1e-5, atol=1e-5)

    encoder.save(tmp_path / "again", tmp_path / "words")
    kept = type(model).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in model.state_dict().items())
    tokenizer.chat_template = None
    shutil.rmtree(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(StditError, match="no chat template"):
        load_text_encoder(tmp_path).encode(["a"])
    with pytest.raises(StditError, match="no chat template"):
        TextLimit.of_folder(tmp_path, treatment_of(tmp_path)).count(["a"])


def test_trains_and_padding_gets_no_gradient(encoder):
    ids = encoder.tokenize(["a red circle", "a"])
    encoder.zero_grad()
    encoder.train()
    sum(one.square().sum() for one in encoder(ids)).backward()
    grad = encoder.encoder.shared.weight.grad
    used = {token for one in ids for token in one}
    assert {row for row in range(len(grad)) if grad[row].any()} == used
    assert 0 not in used
    first, second = encoder(ids), encoder(ids)  # no dropout in training mode either
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    encoder.zero_grad()


@pytest.mark.parametrize(("dim", "layers", "heads"), [(96, 2, 4), (32, 1, 2)])
def test_a_fresh_encoder_tells_words_apart(dim, layers, heads):
    """Fresh outputs: changing a word changes its own position most, and about as much as two random vectors differ."""
    tokenizer = build_word_tokenizer(CAPTIONS)
    encoder = TextEncoder(small_umt5(len(tokenizer), dim, layers, heads), tokenizer)
    red, blue = encoder.encode(["a red circle moves left", "a blue circle moves left"])
    assert 0.5 < red.std() < 2  # the final RMSNorm
    change = (red - blue).norm(dim=1) / red.norm(dim=1)  # √2 for independent vectors
    assert change.argmax() == 1 and change[1] > 1
    swapped = encoder.encode(["circle red a moves left"])[0]
    assert (swapped[2] - red[0]).norm() < (swapped[2] - red[2]).norm()  # "a" is nearer to "a" than to "circle"


def test_the_seed_decides_and_the_global_generator_is_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = small_umt5(9, 16, 1, 2), small_umt5(9, 16, 1, 2), small_umt5(9, 16, 1, 2, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.shared.weight, two.shared.weight)
    assert not torch.equal(one.shared.weight, other.shared.weight)


def test_saved_folders_open_here_and_in_transformers(encoder, tmp_path):
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()
    theirs = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    expected = encoder.encode(CAPTIONS)
    for folder in (tmp_path, tmp_path / "text_encoder"):
        for a, b in zip(load_text_encoder(folder, max_length=16).encode(CAPTIONS), expected):
            assert torch.equal(a, b)
    assert torch.equal(theirs.shared.weight, encoder.encoder.shared.weight)


def test_t5_opens_and_loses_its_dropout(tmp_path):
    tokenizer = build_word_tokenizer(CAPTIONS)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = load_text_encoder(tmp_path).train()
    ids = encoder.tokenize(CAPTIONS)
    assert encoder.dim == 16
    assert all(torch.equal(a, b) for a, b in zip(encoder(ids), encoder(ids)))


def test_errors_say_what_to_do(encoder, tmp_path):
    with pytest.raises(StditError, match="nothing is downloaded"):
        load_text_encoder("google/umt5-xxl")
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    config = tmp_path / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "num_layers": 3}))
    with pytest.raises(StditError, match=r"encoder\.block\.2"):
        load_text_encoder(tmp_path)
    config.write_text(json.dumps({**settings, "model_type": "bert"}))
    with pytest.raises(StditError, match="'bert'"):
        load_text_encoder(tmp_path)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(StditError, match="no tokenizer"):
        load_text_encoder(tmp_path)
    with pytest.raises(StditError, match="belong together"):
        TextEncoder(small_umt5(5, 16, 1, 2), encoder.tokenizer)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("text_encoder/model.safetensors", POINTER, r"text_encoder/model\.safetensors: is a Git LFS pointer.*lfs pull"),
        ("text_encoder/config.json", POINTER, r"config\.json: is a Git LFS pointer"),
        ("tokenizer/tokenizer.json", POINTER, r"tokenizer\.json: is a Git LFS pointer"),
        ("tokenizer/spiece.model", POINTER, r"spiece\.model: is a Git LFS pointer"),
        ("text_encoder/model.safetensors", 3000, r"model\.safetensors: is cut short"),
        ("text_encoder/model.safetensors", 60, r"model\.safetensors: is cut short"),
        ("text_encoder/model.safetensors", 0, r"model\.safetensors: is empty"),
        ("text_encoder/model.safetensors", None, r"no \.safetensors file is .* is a download that has not"),
        ("text_encoder/config.json", None, r"holds no config\.json"),
        ("text_encoder/config.json", b"[]", r"cannot read config\.json"),
        ("text_encoder/config.json", b'{"model_type": "nonsense"}', r"cannot read config\.json"),
        ("text_encoder/config.json", b'{"model_type": "vit"}', "'vit' is no text encoder known"),
        ("text_encoder/model.safetensors.index.json", b'{"weight_map": {"a": "2.safetensors"}}', "lacks 1 of its 1"),
        ("text_encoder/model.safetensors.index.json", b"[]", r"index\.json: cannot be read"),
        ("tokenizer/tokenizer.json", 500, "cannot read a tokenizer"),
        ("tokenizer/tokenizer.json", None, "vocabulary is missing"),
        ("tokenizer", None, r"no tokenizer in it or beside it \(.*tokenizer is not there\)"),
        ("text_encoder", None, r"this model folder has no text_encoder/\. Download"),
    ],
)  # fmt: skip
def test_what_a_broken_download_left_is_named_in_one_line(encoder, tmp_path, file, content, words):
    """content: the file's, or how many of its bytes are left; None: it is gone."""
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    if content is None and file.startswith("tokenizer/"):  # of this class transformers makes a vocabulary up
        config["tokenizer_class"] = "T5Tokenizer"
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    kept = tmp_path / ".cache" / "huggingface" / "download" / "text_encoder"
    kept.mkdir(parents=True)
    (kept / "abc.incomplete").write_bytes(b"half")
    path = tmp_path / file
    if isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    elif content is not None:
        path.write_bytes(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(StditError, match=words) as caught:
        load_text_encoder(tmp_path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)


def test_a_tokenizer_that_loads_but_reads_no_text_is_named(encoder, tmp_path):
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "auto"}))
    with pytest.raises(StditError, match=r"tokenizer: this tokenizer reads no text \(.*Download the folder again"):
        load_text_encoder(tmp_path)


def test_a_tokenizer_of_another_encoder_is_refused(encoder):
    with pytest.raises(
        StditError,
        match=r"largest id is \d+, the text encoder has 12000 emb.*belong together",
    ):
        TextEncoder(small_umt5(12_000, 8, 1, 2), encoder.tokenizer)
    TextEncoder(small_umt5(len(encoder.tokenizer) + 28, 8, 1, 2), encoder.tokenizer)  # rounded up, as T5's is
    gap = build_word_tokenizer(CAPTIONS)
    gap.add_tokens(["far"])
    with pytest.raises(StditError, match="belong together"):
        TextEncoder(small_umt5(len(gap) - 1, 8, 1, 2), gap)


def test_an_image_encoder_that_is_not_whole_is_named(tmp_path):
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**settings, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "image_encoder"
    )
    CLIPImageProcessor().save_pretrained(tmp_path / "image_processor")
    assert load_image_encoder(tmp_path).dim == 8
    weights, config = (tmp_path / "image_encoder" / name for name in ("model.safetensors", "config.json"))
    whole, described = weights.read_bytes(), config.read_bytes()
    for content, words in ((POINTER, "Git LFS pointer"), (whole[:3000], "cut short")):
        weights.write_bytes(content)
        with pytest.raises(StditError, match=words):
            load_image_encoder(tmp_path)
    weights.write_bytes(whole)
    config.write_text('{"model_type": "vit"}')
    with pytest.raises(StditError, match=r"do not fit its config\.json: .*another model"):
        load_image_encoder(tmp_path)
    config.write_bytes(described)
    (tmp_path / "image_processor" / "preprocessor_config.json").write_text("[]")
    with pytest.raises(StditError, match=r"image_processor: transformers cannot read it"):
        load_image_encoder(tmp_path)
    shutil.rmtree(tmp_path / "image_processor")
    with pytest.raises(StditError, match="has no image_processor/"):
        load_image_encoder(tmp_path)


def test_weights_are_read_when_they_are_needed(encoder, tmp_path):
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    late = load_text_encoder(tmp_path, max_length=16, deferred=True)
    assert late.dim == encoder.dim and late.tokenize(CAPTIONS) == encoder.tokenize(CAPTIONS)
    late.requires_grad_(False).to("cpu", torch.bfloat16)
    assert all(p.is_meta for p in late.encoder.parameters())
    wanted = load_text_encoder(tmp_path, max_length=16, dtype=torch.bfloat16).encode(CAPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(late.encode(CAPTIONS), wanted))
    assert {(p.dtype, p.requires_grad) for p in late.encoder.parameters()} == {(torch.bfloat16, False)}
    late.to(torch.float32)
    assert next(late.encoder.parameters()).dtype == torch.float32

    again = load_text_encoder(tmp_path, deferred=True)
    again.save(tmp_path / "again" / "text_encoder", tmp_path / "again" / "tokenizer")
    one, other = (load_text_encoder(place).encode(["a"])[0] for place in (tmp_path, tmp_path / "again"))
    assert torch.equal(one, other)
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(StditError, match="Git LFS pointer"):
        load_text_encoder(tmp_path, deferred=True)  # and not hours later


def test_a_vision_language_model_is_deferred_too(tmp_path):
    model, tokenizer = small_reason(CAPTIONS)
    model.save_pretrained(tmp_path / "text_encoder"), tokenizer.save_pretrained(tmp_path / "tokenizer")
    late, now = (load_text_encoder(tmp_path, max_length=40, deferred=deferred) for deferred in (True, False))
    assert late.dim == now.dim and torch.equal(late.encode(CAPTIONS[:1])[0], now.encode(CAPTIONS[:1])[0])


T5_CONFIG = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "extra_ids": 100,
    "model_max_length": 512,
}


def test_a_sentencepiece_vocabulary_alone_gives_its_own_ids(tmp_path):
    """The tokenizers of LTX-Video, PixArt, Latte and Allegro are a spiece.model without a tokenizer.json."""
    sentences = [*CAPTIONS, "the camera pans over a beach at sunset", "Ein gelber Kreis wächst, langsam."] * 4
    (tmp_path / "tokenizer").mkdir()
    with open(tmp_path / "tokenizer" / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, model_type="unigram", vocab_size=80,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(T5_CONFIG))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "spiece.model"))
    size = reference.get_piece_size() + T5_CONFIG["extra_ids"]
    config = T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    encoder = load_text_encoder(tmp_path, max_length=64)
    encoder.treatment = replace(encoder.treatment, clean="none")
    texts = [
        *CAPTIONS,
        "",
        "waves  at   sunset",
        " spaces around ",
        "wächst, ½ ﬁ ＡＢＣ",
        "unknown 日本",
        "a\nb\tc",
    ]
    ids = encoder.tokenize(texts)
    assert ids == [[*reference.encode(text), 1] for text in texts]
    assert ids[texts.index("")] == [1] and 2 in ids[texts.index("unknown 日本")]
    assert [len(one) for one in encoder.encode(texts)] == [len(one) for one in ids]

    encoder.save(tmp_path / "again" / "text_encoder", tmp_path / "again" / "tokenizer")
    again = load_text_encoder(tmp_path / "again", max_length=64)
    again.treatment = encoder.treatment
    assert again.tokenize(texts) == ids


@pytest.mark.parametrize(("module", "package"), [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")])
def test_a_package_for_sentencepiece_files_that_is_broken_is_named(module, package, encoder, tmp_path, monkeypatch):
    """transformers would ask for tiktoken, which does not read them."""
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "spiece.model")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StditError, match=rf"spiece\.model: reading it needs the package {package}, which cannot"):
        load_text_encoder(tmp_path)

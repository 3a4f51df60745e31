"""Folders and a cache laid out as facebook/wav2vec2-conformer-rel-pos-large-960h-ft is on the hub, with random weights.

The hub lists its files with their sizes: the four small ones are here to the byte, config.json to the three digits it
gives, and a model of it has the published 618,591,904 parameters. What its `layerdrop` is was not to be seen: here it
is the class's own default, which is harder on training than 0 would be.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

NAME = "facebook/wav2vec2-conformer-rel-pos-large-960h-ft"
CONFIG = {
    "activation_dropout": 0.1,
    "adapter_kernel_size": 3,
    "adapter_stride": 2,
    "add_adapter": False,
    "apply_spec_augment": True,
    "architectures": ["Wav2Vec2ConformerForCTC"],
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "classifier_proj_size": 256,
    "codevector_dim": 768,
    "conformer_conv_dropout": 0.1,
    "contrastive_logits_temperature": 0.1,
    "conv_bias": True,
    "conv_depthwise_kernel_size": 31,
    "conv_dim": [512, 512, 512, 512, 512, 512, 512],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "diversity_loss_weight": 0.1,
    "do_stable_layer_norm": True,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_extract_norm": "layer",
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "swish",
    "hidden_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_time_prob": 0.05,
    "max_source_positions": 5000,
    "model_type": "wav2vec2-conformer",
    "num_adapter_layers": 3,
    "num_attention_heads": 16,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 24,
    "num_negatives": 100,
    "output_hidden_size": 1024,
    "pad_token_id": 0,
    "position_embeddings_type": "relative",
    "proj_codevector_dim": 768,
    "rotary_embedding_base": 10000,
    "tdnn_dilation": [1, 2, 3, 1, 1],
    "tdnn_dim": [512, 512, 512, 512, 1500],
    "tdnn_kernel": [5, 3, 3, 1, 1],
    "torch_dtype": "float32",
    "transformers_version": "4.19.0.dev0",
    "use_weighted_layer_sum": False,
    "vocab_size": 32,
    "xvector_output_dim": 512,
}
NARROW = {"hidden_size": 32, "output_hidden_size": 32, "intermediate_size": 64, "conv_dim": [16] * 7}
LETTERS = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"  # by how often they occur, after the special tokens and the space
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOKENIZER = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "do_lower_case": False,
    "word_delimiter_token": "|",
    "replace_word_delimiter_char": " ",
    "processor_class": "Wav2Vec2Processor",
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
}
PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "processor_class": "Wav2Vec2Processor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
OLD_NAMES = {  # of weight_norm's parameters, before torch 2.1
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def recogniser(seed: int = 0, **changes) -> Wav2Vec2ConformerForCTC:
    """Of `CONFIG` with these changes. No weight, bias or statistic has a value that a new model begins with."""
    torch.manual_seed(seed)
    model = Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**CONFIG | changes)).eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                values.fill_(1000 + seed)
            elif name.endswith(("running_var", "norm.weight", "original0")):
                values.uniform_(0.5, 1.5)
            else:
                values.add_(torch.randn_like(values), alpha=0.05)
    return model


def as_published(weights: OrderedDict) -> OrderedDict:
    """A state dict under the names of its day, in which both published files hold it."""
    renamed = OrderedDict()
    for name, values in weights.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = values
    renamed._metadata = weights._metadata  # pickled along, as `state_dict` gives it
    return renamed


def write_folder(folder: Path, model: Wav2Vec2ConformerForCTC, weights: str, **changes) -> Path:
    """All files of the repository; `changes` are those of the model's config.

    `weights`: bin (the main branch), safetensors (its pull request 3, of the same names), or both.
    """
    folder.mkdir(parents=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    lines = {"ensure_ascii": False, "indent": 2, "sort_keys": True}
    (folder / "config.json").write_text(json.dumps(CONFIG | changes, **lines) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, **lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}), encoding="utf-8")
    named = as_published(model.state_dict())
    if weights in ("bin", "both"):
        torch.save(named, folder / "pytorch_model.bin")
    if weights in ("safetensors", "both"):
        save_file(dict(named), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_cache(cache: Path, name: str, revisions: dict[str, Path]) -> None:
    """What huggingface_hub leaves below HF_HUB_CACHE after downloading {branch or pull request: folder}."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, folder) in enumerate(revisions.items(), 1):
        commit = f"{number:040x}"
        reference, snapshot = repository / "refs" / revision, repository / "snapshots" / commit
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for file in folder.iterdir():
            blob = repository / "blobs" / f"{commit[-4:]}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)

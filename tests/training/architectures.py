"""Models as people bring them, small and from configurations alone: Hugging Face architectures, and PEFT's methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import peft
import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, LENGTH, CLASSES, RECORDS = 50, 10, 2, 24

#: Two layers, sixteen wide, two heads; no dropout, so that one engine can be compared with the other.
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 24, "max_position_embeddings": 32}  # fmt: skip
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
                         "image_size": 16, "patch_size": 8, "num_labels": CLASSES, **STILL}  # fmt: skip
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


def language(config: Any) -> nn.Module:
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config)
    return model


def classifier(config: Any) -> nn.Module:
    model: nn.Module = hf.AutoModelForSequenceClassification.from_config(config)
    return model


def images(config: Any) -> nn.Module:
    model: nn.Module = hf.AutoModelForImageClassification.from_config(config)
    return model


def translation(config: Any) -> nn.Module:
    model: nn.Module = hf.AutoModelForSeq2SeqLM.from_config(config)
    return model


#: By name: the kind of task, and what makes the model.
ARCHITECTURES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "GPT-2": ("language", lambda: language(hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0))),
    "GPT-Neo": ("language", lambda: language(hf.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32, window_size=8, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0))),
    "GPT-NeoX": ("language", lambda: language(hf.GPTNeoXConfig(**TEXT))),
    "GPT-J": ("language", lambda: language(hf.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0))),
    "Llama": ("language", lambda: language(hf.LlamaConfig(**DECODER))),
    "Mistral": ("language", lambda: language(hf.MistralConfig(**DECODER))),
    "Qwen2": ("language", lambda: language(hf.Qwen2Config(**DECODER))),
    "Qwen3": ("language", lambda: language(hf.Qwen3Config(**DECODER))),
    "Gemma": ("language", lambda: language(hf.GemmaConfig(**DECODER))),
    "Gemma 2": ("language", lambda: language(hf.Gemma2Config(**DECODER, query_pre_attn_scalar=8))),
    "Phi": ("language", lambda: language(hf.PhiConfig(**TEXT, resid_pdrop=0.0, embd_pdrop=0.0))),
    "OPT": ("language", lambda: language(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0))),
    "Bloom": ("language", lambda: language(hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0))),
    "Falcon": ("language", lambda: language(hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))),
    "Mamba": ("language", lambda: language(hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))),
    "BERT": ("classes", lambda: classifier(hf.BertConfig(**TEXT, **STILL, num_labels=CLASSES))),
    "RoBERTa": ("classes", lambda: classifier(hf.RobertaConfig(
        **{**TEXT, "max_position_embeddings": 40}, **STILL, num_labels=CLASSES))),
    "DistilBERT": ("classes", lambda: classifier(hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=CLASSES))),
    "ALBERT": ("classes", lambda: classifier(hf.AlbertConfig(
        **TEXT, embedding_size=8, classifier_dropout_prob=0.0, num_labels=CLASSES, **STILL))),
    "ELECTRA": ("classes", lambda: classifier(hf.ElectraConfig(**TEXT, embedding_size=8, num_labels=CLASSES, **STILL))),
    "DeBERTa-v2": ("classes", lambda: classifier(hf.DebertaV2Config(
        **TEXT, **STILL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        norm_rel_ebd="layer_norm", pooler_dropout=0.0, num_labels=CLASSES))),
    "T5": ("translation", lambda: translation(hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0))),
    "BART": ("translation", lambda: translation(hf.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0))),
    "ViT": ("images", lambda: images(hf.ViTConfig(**IMAGE))),
    "DeiT": ("images", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE))),
    "BEiT": ("images", lambda: images(hf.BeitConfig(**IMAGE, drop_path_rate=0.0, use_relative_position_bias=True))),
    "DINOv2": ("images", lambda: images(hf.Dinov2Config(**IMAGE, drop_path_rate=0.0))),
    "Swin": ("images", lambda: images(hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0,
        num_labels=CLASSES))),
    "ConvNeXt": ("images", lambda: images(hf.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, drop_path_rate=0.0, num_labels=CLASSES))),
    "Wav2Vec2": ("sound", lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        feat_proj_dropout=0.0, layerdrop=0.0, apply_spec_augment=False, final_dropout=0.0, feat_extract_norm="layer",
        num_labels=CLASSES,
        classifier_proj_size=8))),
}  # fmt: skip


def llama() -> nn.Module:
    return ARCHITECTURES["Llama"][1]()


def adapted(make: Callable[[], Any]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        found: nn.Module = peft.get_peft_model(llama(), make())
        for parameter in found.parameters():  # adapters begin at zero: half of the gradients would vanish
            if parameter.requires_grad and parameter.dim() and not parameter.abs().sum():
                nn.init.normal_(parameter, std=0.05)
        return found

    return model


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    name: ("language", adapted(make))
    for name, make in {
        "LoRA": lambda: peft.LoraConfig(target_modules="all-linear", r=2, **CAUSAL),
        "LoRA on embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, **CAUSAL),
        "DoRA": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, use_dora=True, **CAUSAL),
        "AdaLoRA": lambda: peft.AdaLoraConfig(
            total_step=100, init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], **CAUSAL
        ),
        "IA3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
        ),
        "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2, vera_dropout=0.0, **CAUSAL),
        "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2, alpha=2, **CAUSAL),
        "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], r=2, oft_block_size=0, **CAUSAL),
        "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
        "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
        "LayerNorm tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **CAUSAL),
        "trainable tokens": lambda: peft.TrainableTokensConfig(
            token_indices=[3, 4], target_modules=["embed_tokens"], **CAUSAL
        ),
    }.items()
}


class Training(pl.LightningModule):
    """A model that computes its own loss, as Hugging Face's do; SGD, so that an update is the gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def records(task: str, count: int = RECORDS) -> list[dict[str, Tensor]]:
    """Made-up records of a task."""
    generator = torch.Generator().manual_seed(3)

    def record() -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        label = torch.randint(0, CLASSES, (), generator=generator)
        return {
            "language": lambda: {"input_ids": tokens, "labels": tokens},
            "classes": lambda: {"input_ids": tokens, "labels": label},
            "translation": lambda: {"input_ids": tokens, "labels": tokens.flip(0)},
            "images": lambda: {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": label},
            "sound": lambda: {"input_values": torch.randn(400, generator=generator), "labels": label},
        }[task]()

    return [record() for _ in range(count)]

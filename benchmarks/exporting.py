"""Write models as files for programs that run models: .onnx and .gguf."""

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from wanda_lightning.common.text_features import reads_texts


class WithCache(nn.Sequential):
    """A causal language model whose cache is a list of tensors: keys and values of each layer."""

    def forward(self, ids, kept, past):
        """Return the logits at the positions `kept`, and the cache with the new tokens."""
        size, new = ids.shape
        known = past[0].shape[2]
        positions = torch.arange(new) + known
        mask = torch.arange(known + new)[None] <= positions[:, None]
        output = self[0](
            input_ids=ids,
            cache=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            position_ids=positions[None],
            attention_mask=mask[None, None].expand(size, 1, -1, -1),
            logits_to_keep=kept,
        )
        cache = []
        for layer in output.cache.layers:
            cache += [layer.keys, layer.values]
        return output.logits, cache


class WithMask(nn.Sequential):
    """A sentence encoder whose features are tensors: tokens, and which of them are no padding."""

    def forward(self, ids, mask):
        """Return the embeddings."""
        return self[0]({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]


def write(model, file, template=None):
    """Write a file in the format that its ending names; `template` is the dense .gguf file."""
    if file.suffix == ".gguf":
        to_gguf(template, model, file)
    else:
        to_onnx(model, file)


def to_onnx(model, file):
    """Write float32 for any number of images, of sentences and tokens, or of sequences, tokens and cached tokens."""
    # Numbers of samples and tokens that are not equal by chance.
    ids = torch.ones(2, 7, dtype=torch.long)
    if hasattr(model, "pretrained_cfg"):
        example = (torch.zeros(2, *model.pretrained_cfg["input_size"]),)
        sizes = ({0: "batch"},)
    elif reads_texts(model):
        example = (ids, ids.clone())  # one tensor twice would be one input
        sizes = ({0: "batch", 1: "tokens"},) * 2
        model = WithMask(model).eval()
    else:
        # 7 tokens after 5 in the cache, with the logits of 3.
        config = model.config
        shape = (2, config.num_key_value_heads, 5, config.head_dim)
        past = [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]
        example = (ids, torch.tensor([3, 5, 6]), past)
        sizes = ({0: "batch", 1: "new"}, {0: "kept"}, [{0: "batch", 2: "past"}] * len(past))
        model = WithCache(model).eval()
    torch.onnx.export(model, example, file, dynamo=True, dynamic_shapes=sizes)


def to_gguf(template, model, file):
    """Write a Llama in float32 with the tokenizer of a .gguf file; as `deci` if layers differ in width."""
    import gguf

    widths = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
    family = "llama" if len(set(widths)) == 1 else "deci"
    writer = gguf.GGUFWriter(file, family)
    written = ("general.architecture", "general.file_type")  # by the writer itself
    for name, field in gguf.GGUFReader(template).fields.items():
        if name.endswith(".feed_forward_length"):
            writer.add_feed_forward_length(widths if family == "deci" else widths[0])
        elif not name.startswith("GGUF.") and name not in written:
            key = name.replace("llama.", f"{family}.")
            writer.add_key_value(key, field.contents(), *field.types[:2])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(widths))
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, weight in model.named_parameters():  # a tied one comes once
        array = weight.detach().numpy()
        count = heads.get(name.split(".")[-2])
        if count:
            # llama.cpp rotates pairs of neighbors, and transformers the two halves of a head.
            array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

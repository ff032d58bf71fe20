"""Write adapters that peft and lycoris made, with the weights that they merge to, for tests/test_references.py.

    python tests/references/peft_adapters.py     # in an environment with torch, peft 0.21 and lycoris-lora 4.0

A model of one linear layer, named as a layer of SD3's transformer in diffusers, gets an adapter of each kind with random
values; peft itself merges it into the weight, in float64, and lycoris computes with it.
"""

import json
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "peft_adapters.npz"
ROWS, COLUMNS, RANK = 24, 16, 4
LAYER = "transformer_blocks.0.attn.to_q"


def main() -> None:
    """Make every kind, and write the reference."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict

    def model():
        attention = torch.nn.Module()
        attention.to_q = torch.nn.Linear(COLUMNS, ROWS, dtype=torch.float64)
        block = torch.nn.Module()
        block.attn = attention
        whole = torch.nn.Module()
        whole.transformer_blocks = torch.nn.ModuleList([block])
        return whole

    def fill(parameters):
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)

    torch.manual_seed(0)
    found, notes = {}, {}
    rank = {"r": RANK, "target_modules": ["to_q"]}
    kinds = {
        "lora": LoraConfig(lora_alpha=6, **rank),
        "rslora": LoraConfig(lora_alpha=6, use_rslora=True, **rank),
        "alpha pattern": LoraConfig(lora_alpha=6, alpha_pattern={"attn.to_q": 3}, **rank),
        "dora": LoraConfig(lora_alpha=6, use_dora=True, **rank),
        "loha": LoHaConfig(alpha=6, **rank),
        "lokr of rank 1": LoKrConfig(r=1, target_modules=["to_q"], alpha=3, decompose_factor=4),
        "lokr": LoKrConfig(alpha=6, decompose_both=True, decompose_factor=4, **rank),
    }
    for kind, config in kinds.items():
        base = model()
        weight = base.transformer_blocks[0].attn.to_q.weight.detach().clone()
        adapted = get_peft_model(base, config).double()
        fill(p for name, p in adapted.named_parameters() if p.requires_grad)
        state = {key: value.numpy() for key, value in get_peft_model_state_dict(adapted).items()}
        merged = adapted.merge_and_unload().transformer_blocks[0].attn.to_q.weight.detach()
        found |= {f"{kind}/base": weight.numpy(), f"{kind}/merged": merged.numpy()}
        found |= {f"{kind}/file/{key}": value for key, value in state.items()}
        notes[kind] = {
            k: v for k, v in config.to_dict().items() if isinstance(v, int | float | str | bool | dict | None)
        }
    for kind in ("loha", "lokr", "dora"):
        base = model()
        weight = base.transformer_blocks[0].attn.to_q.weight.detach().clone()
        LycorisNetwork.apply_preset({"target_module": ["Linear"]})
        options = {"algo": "lora", "dora_wd": True} if kind == "dora" else {"algo": kind, "factor": 4}
        network = create_lycoris(
            base, 1.0, linear_dim=1 if kind == "lokr" else RANK, linear_alpha=3, **options
        ).double()
        network.apply_to()
        fill(network.parameters())
        state = {key: value.detach().numpy() for key, value in network.state_dict().items()}
        layer = base.transformer_blocks[0].attn.to_q  # its forward pass counts: merge_to of this version scales twice
        merged = (layer(torch.eye(COLUMNS, dtype=torch.float64)) - layer.bias).detach().T
        found |= {f"lycoris {kind}/base": weight.numpy(), f"lycoris {kind}/merged": merged.numpy()}
        found |= {f"lycoris {kind}/file/{key}": value for key, value in state.items()}
        notes[f"lycoris {kind}"] = {}
    np.savez_compressed(REFERENCE, notes=json.dumps(notes), **found)
    print({name: array.shape for name, array in found.items()})


if __name__ == "__main__":
    main()

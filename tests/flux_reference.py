"""Compute FLUX's blocks in NumPy and float64, from the original checkpoint's keys.

Nothing of DiffusionKit, MLX or the toolkit is used. The blocks are those of Black Forest Labs' model.py, with
DiffusionKit's liberty of an exact GELU.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf)


class Flux:
    """The blocks of a checkpoint {key: array}.

    `inputs` holds the input of each linear layer of the blocks that were computed, under the toolkit's names.
    """

    def __init__(self, weights, heads, axes):
        self.weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self.heads, self.axes, self.inputs = heads, axes, {}

    def linear(self, key, x):
        """Return the output of a linear layer for x (tokens, inputs)."""
        return x @ self.weights[f"{key}.weight"].T + self.weights[f"{key}.bias"]

    def modulation(self, key, vec, count):
        """Return `count` modulation vectors (hidden,) of SiLU(vec), vec (hidden,)."""
        return np.split(self.linear(key, vec / (1 + np.exp(-vec))), count, axis=-1)

    def rotations(self, text, height, width):
        """Return the angles (tokens, head / 2): text tokens lie at the origin, image tokens at (0, row, column)."""
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        image = np.stack([0 * rows, rows, columns], axis=-1).reshape(-1, 3)
        at = np.concatenate([np.zeros((text, 3)), image])
        return np.concatenate(
            [at[:, i : i + 1] / 10_000 ** (np.arange(0, dim, 2) / dim) for i, dim in enumerate(self.axes)], axis=1
        )

    def attention(self, q, k, v, angles):
        """Return the attention (tokens, hidden) of normalized q, k and v, (tokens, hidden) each, heads side by side."""

        def split(x):
            return x.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

        def rotate(x):
            a, b = split(x)[..., 0::2], split(x)[..., 1::2]
            found = np.stack([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)
            return found.reshape(*found.shape[:2], -1)

        q, k, v = rotate(q), rotate(k), split(v)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        return mixed.transpose(1, 0, 2).reshape(len(mixed[0]), -1)

    def qkv(self, joined, norm):
        """Split joined (tokens, 3·hidden) into q, k and v, q and k normalized; norm: the prefix of the norms' keys."""
        q, k, v = np.split(joined, 3, axis=-1)
        return self.rms(q, f"{norm}.query_norm.scale"), self.rms(k, f"{norm}.key_norm.scale"), v

    def rms(self, x, key):
        """Return x (tokens, hidden) with each head divided by its root mean square, times the weights."""
        heads = x.reshape(len(x), self.heads, -1)
        return (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * self.weights[key]).reshape(x.shape)

    def double(self, i, img, txt, vec, angles):
        """Compute double block i on one row; return image and text tokens.

        img and txt: (tokens, hidden) each; vec (hidden,); angles: the result of `rotations`.
        """
        key, streams = f"double_blocks.{i}", {"txt": txt, "img": img}
        mods = {s: self.modulation(f"{key}.{s}_mod.lin", vec, 6) for s in streams}
        parts = []
        for s, x in streams.items():
            seen = modulated(x, *mods[s][:2])
            self.inputs[f"mm{i}.{s}.attn.q_proj"] = seen
            parts.append(self.qkv(self.linear(f"{key}.{s}_attn.qkv", seen), f"{key}.{s}_attn.norm"))
        mixed = self.attention(*(np.concatenate(pair) for pair in zip(*parts, strict=True)), angles)
        given = {}
        for s, part in (("txt", mixed[: len(txt)]), ("img", mixed[len(txt) :])):
            _, _, gate, shift, scale, second_gate = mods[s]
            x = streams[s] + gate * self.linear(f"{key}.{s}_attn.proj", part)
            seen = modulated(x, shift, scale)
            hidden = gelu(self.linear(f"{key}.{s}_mlp.0", seen))
            self.inputs |= {f"mm{i}.{s}.attn.o_proj": part, f"mm{i}.{s}.mlp.fc1": seen, f"mm{i}.{s}.mlp.fc2": hidden}
            given[s] = x + second_gate * self.linear(f"{key}.{s}_mlp.2", hidden)
        return given["img"], given["txt"]

    def single(self, i, x, vec, angles):
        """Compute single block i on one row; x and the result: all tokens (tokens, hidden), text first."""
        key, size = f"single_blocks.{i}", x.shape[-1]
        shift, scale, gate = self.modulation(f"{key}.modulation.lin", vec, 3)
        seen = modulated(x, shift, scale)
        given = self.linear(f"{key}.linear1", seen)
        part = self.attention(*self.qkv(given[:, : 3 * size], f"{key}.norm"), angles)
        hidden = gelu(given[:, 3 * size :])
        self.inputs |= {f"uni{i}.attn.q_proj": seen, f"uni{i}.attn.o_proj": part}
        self.inputs |= {f"uni{i}.mlp.fc1": seen, f"uni{i}.mlp.fc2": hidden}
        return x + gate * self.linear(f"{key}.linear2", np.concatenate([part, hidden], axis=1))

    def last(self, img, vec):
        """Return the patches (tokens, 64) of image tokens (tokens, hidden)."""
        shift, scale = self.modulation("final_layer.adaLN_modulation.1", vec, 2)
        return self.linear("final_layer.linear", modulated(img, shift, scale))


def modulated(x, shift, scale):
    """Return LayerNorm(x) · (1 + scale) + shift, x (tokens, hidden)."""
    centred = x - x.mean(-1, keepdims=True)
    return (1 + scale) * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + shift


def gelu(x):
    """Return the exact GELU of x."""
    return x * (1 + ERF(x / math.sqrt(2))) / 2

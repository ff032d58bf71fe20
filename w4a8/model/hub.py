"""Load models of the Hugging Face hub, or of its local cache, by DiffusionKit's own loaders."""

import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from huggingface_hub import constants as hub_constants

from calibration_store.model_folder import weight_file
from w4a8.model.catalog import ExportedHubModel, HubModel, ModelError, model_files
from w4a8.model.diffusionkit import (
    HUB_TEXT_ENCODERS,
    CLIPTextModel,
    VAEDecoder,
    model_io,
)
from w4a8.model.folder import load_folder_transformer
from w4a8.model.hub_files import HubFileError
from w4a8.model.hub_parts import empty_clip, load_clip, load_t5, load_tokenizer, pack_t5, vae_arrays
from w4a8.model.lora import fuse_text_encoder
from w4a8.model.packed import AUTO
from w4a8.model.parts import DECODER, TEXT, TRANSFORMER, Parts, Pipeline, check_finite, load_weights
from w4a8.model.t5 import T5Encoder
from w4a8.model.transformer import open_transformer


class HubPipeline(Pipeline):
    """DiffusionKit's pipeline over a model of the Hugging Face hub, or of its local cache."""

    def __init__(self, info: HubModel, parts: Parts, use_t5: bool, instead: str, native: str = AUTO):
        """Fetch the files that the local cache lacks, and load the tokenizers where text encoders are asked for.

        instead: the end of the message when the hub cannot be reached. Raises ModelError.
        """
        super().__init__(info, parts, use_t5, native)
        self.instead, self.unreachable = instead, _reach_hub()
        self.mmdit_config = info.family.config
        self.model = HUB_TEXT_ENCODERS
        self.model_version = info.hub_id  # DiffusionKit looks its files up by this name
        with self.explained():
            model_files(info, use_t5, download=True)
            if TEXT in parts:
                for name in self.family.clip:
                    setattr(self, name.replace("clip", "tokenizer"), load_tokenizer(name))
                if use_t5:
                    self.t5_tokenizer = model_io.load_t5_tokenizer(self.t5_length)

    def read(self, part: str) -> None:
        """Set the part's attributes from its files in the hub's cache, or from the checkpoint."""
        half = self.parts[part] != "float32"
        if part == TRANSFORMER:
            self.load_mmdit()
            check_finite(self.mmdit, self.info.checkpoint or f"{self.info.version}, transformer", self.dtype)
        elif part == DECODER:
            self.decoder = self.load_decoder(half)
            check_finite(self.decoder, f"{self.info.checkpoint or self.info.version}, VAE decoder")
        else:
            self._load_text(half)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of the block into a ModelError that names the file and its repository, the reason and the way out."""
        try:
            yield
        except HubFileError as error:
            reason = f"{self.unreachable}; {error.reason}" if self.unreachable else error.reason
            way = (
                f"bring the cache of a machine that has it (HF_HOME; Issue 14; hf download {error.repository}){self._own_file(error)}"
                if self.unreachable
                else f"accept the licence on https://huggingface.co/{error.repository} and log in with `hf auth login`"
            )
            raise ModelError(
                f"cannot get {error.name} of {error.repository} from the Hugging Face hub ({reason}): {way}{self.instead}"
            ) from None
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            source = self.info.checkpoint or self.info.version
            raise ModelError(f"cannot load {source}: {' '.join(str(error).split())[:200]}") from None

    def _own_file(self, error: HubFileError) -> str:
        """Return the way of somebody who has the transformer's file, where it is the one that is missing."""
        if self.info.checkpoint is not None or error.repository != self.info.hub_id:
            return ""
        return ", or give the file that you have with --model FILE (CHECKPOINT=FILE in runs/sd3_medium.sh)"

    def load_mmdit(self) -> None:
        """Open the transformer as DiffusionKit's loader does, with LoRAs fused; its weights are not read yet."""
        self.mmdit = open_transformer(self.info)

    def load_decoder(self, half: bool) -> VAEDecoder:
        """Load the VAE decoder in the family's 16 bits, or in float32."""
        found = model_io.vae_decoder_state_dict_adjustments(vae_arrays(self.info, "decoder"), prefix="decoder.")
        decoder, dtype = VAEDecoder(), self.float16_dtype if half else mx.float32
        decoder.load_weights([(name, array.astype(dtype)) for name, array in found.items()])
        return decoder

    def load_encoder(self, name: str, dtype: mx.Dtype) -> CLIPTextModel:
        """Open clip_l or clip_g, from the checkpoint or from the hub; `check_finite` casts it."""
        return load_clip(self.info, name)

    def _load_text(self, half: bool) -> None:
        version, encoders = self.info.version, {}
        dtype = self.float16_dtype if half else mx.float32
        for name in self.family.clip:
            encoders[name] = self.load_encoder(name, dtype)
            check_finite(encoders[name], f"{version}, CLIP-{name[-1].upper()}", dtype)
            fuse_text_encoder(encoders[name], name, self.family, self.info.loras)
        if self.use_t5:
            t5_encoder = load_t5(dtype)
            fuse_text_encoder(t5_encoder, "t5", self.family, self.info.loras)
            if self.info.text_bits != 16:
                pack_t5(t5_encoder, self.info.text_bits)
            check_finite(t5_encoder, f"{version}, T5")
            encoders["t5_encoder"] = T5Encoder(t5_encoder)
        self.__dict__.update(encoders)
        if self.use_t5:
            self.set_up_t5()  # loads the tokenizer alone: the encoder is already there


class ExportedPipeline(HubPipeline):
    """A hub model whose transformer comes from an exported folder, and its decoder where the folder has one."""

    def __init__(self, info: ExportedHubModel, parts: Parts, use_t5: bool, instead: str, native: str = AUTO):
        super().__init__(info, parts, use_t5, instead, native)
        self.folder = info.folder

    def load_mmdit(self) -> None:
        """Load the transformer from the folder; packed layers stay packed."""
        self.mmdit = load_folder_transformer(self.folder, self.dtype, self.info.loras, self.native, self.info.guidance)

    def load_encoder(self, name: str, dtype: mx.Dtype) -> CLIPTextModel:
        """Load clip_l or clip_g from the folder, or from the hub where the folder has none."""
        path = weight_file(self.folder, name)
        return load_weights(empty_clip(name), path, dtype) if path.exists() else super().load_encoder(name, dtype)

    def load_decoder(self, half: bool) -> VAEDecoder:
        """Load the VAE decoder from the folder, or from the hub where the folder has none."""
        path = weight_file(self.folder, "decoder")
        if path.exists():
            return load_weights(VAEDecoder(), path, self.float16_dtype if half else mx.float32)
        return super().load_decoder(half)


def _reach_hub() -> str | None:
    """Look the hub's name up once, and return the reason why only its local cache is used; None with a network.

    huggingface_hub by itself would retry for half a minute per file, with a warning for each try. Behind a proxy
    the name need not resolve here, so nothing is concluded.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    host = urllib.parse.urlsplit(hub_constants.ENDPOINT).hostname
    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        hub_constants.HF_HUB_OFFLINE = True
        return f"no network: {host} cannot be found, and it is not in the local cache"
    return None

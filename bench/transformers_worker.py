"""The reference of `bench.end_to_end`: transformers' generate in an environment of its own (`make parity` makes it).

Reads one JSON object a line and answers with one. It runs under whatever Python there is a PyTorch for, and so imports
nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Reference:
    """PaliGemma from a folder that pyvdl wrote; frames and prompt are those of an npz file."""

    def __init__(self, model: str, inputs: str, dtype: str, device: str) -> None:
        import numpy as np
        import torch
        from transformers import PaliGemmaForConditionalGeneration

        self._torch = torch
        torch.manual_seed(0)
        loaded = PaliGemmaForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.eval().to(device)
        found = np.load(inputs)
        video, prompt = found["video"], found["prompt"]
        clips, frames = video.shape[:2]
        pixels = torch.from_numpy(video.reshape(clips * frames, *video.shape[2:])).to(device).permute(0, 3, 1, 2)
        self._pixels = pixels.to(getattr(torch, dtype)) / 127.5 - 1
        visual = frames * self._model.config.text_config.num_image_tokens
        image = torch.full((clips, visual), self._model.config.image_token_index)
        self._ids = torch.cat([image, torch.from_numpy(prompt.astype(np.int64))], dim=1).to(device)

    def generate(self, num_samples: int, max_length: int, greedy: bool) -> dict[str, Any]:
        """Texts of exactly `max_length` tokens each."""
        options: dict[str, Any] = {"num_return_sequences": num_samples, "do_sample": True, "top_p": 0.95, "top_k": 0}
        if greedy:
            options = {"num_return_sequences": 1, "do_sample": False}

        wall, cpu = time.perf_counter(), time.process_time()
        with self._torch.inference_mode():
            found = self._model.generate(
                input_ids=self._ids,
                pixel_values=self._pixels,
                attention_mask=self._torch.ones_like(self._ids),
                max_new_tokens=max_length,
                min_new_tokens=max_length,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            ).cpu()
        return {
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": found[:, self._ids.shape[1] :].tolist() if greedy else [],
        }


def main() -> None:
    start = json.loads(sys.stdin.readline())
    reference = Reference(**start)
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
    print(json.dumps(versions | {"python": sys.version.split()[0]}), flush=True)
    for line in sys.stdin:
        print(json.dumps(reference.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

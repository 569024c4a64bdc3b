"""The five adapter methods: their defaults, their PEFT configurations and what each needs so that it really trains."""

from __future__ import annotations

from trainer.methods.configs import build_peft_config
from trainer.methods.profiles import PROFILES, Profile, fill_in

__all__ = ["PROFILES", "Profile", "build_peft_config", "fill_in"]

"""Few-step profiles: how distilled checkpoints and LoRAs of a family are run, and the names that tell them.

Imports no torch. A profile is not a family: the keys of its files are those of the plain model, so that names and metadata
tell it, and it changes how the model is run. Facts from the model cards and the papers named in each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hires.checkpoints.families import TURBO_RELAY, Defaults, Relay
from hires.errors import RequestError, unknown

NONE = "none"
"""The value of `few_step` that turns profiles off."""
STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")
MOST_NAMED = 16
"""The highest step count of a few-step model that a name may give."""
TITLES = ("modelspec.title", "ss_output_name", "name", "title")
"""Metadata that name a file; other entries name what it was trained on."""
NAMELESS = ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model", "model", "unet", "pytorch_model")
"""Names that diffusers and peft give to every file, so that the folder's name counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a name holds that tells a profile. Expressions are of lower-case text whose words are apart."""

    word: str
    """A regular expression of the word that names the method."""
    steps: tuple[int, ...] = ()
    """The step counts of which the name gives one; empty for any or none."""
    also: str = ""
    """A second expression that the name holds."""
    only: str = ""
    """'model' or 'lora': the kind of file that it tells; empty for both."""

    def words(self, text: str, kind: str) -> tuple[str, ...]:
        """The words of a name that tell the profile; none where it does not."""
        found, also, count = re.search(self.word, text), re.search(self.also, text), STEPS.search(text)
        if self.only not in ("", kind) or found is None or also is None:
            return ()
        if self.steps and (count is None or int(count[1]) not in self.steps):
            return ()
        told = (found[0], also[0])
        return tuple(dict.fromkeys(word for word in told if word))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One way to run a distilled checkpoint."""

    name: str
    """What `few_step` takes."""
    title: str
    """Its name for people."""
    names: tuple[str, ...]
    """Files, as published, whose names tell it."""
    rules: tuple[Rule, ...]
    defaults: Defaults
    """Steps, guidance, sampler, schedule and relay on a model of 1024 px."""
    bases: tuple[str, ...] = ("sdxl",)
    """The families that it was distilled from."""
    few_step: str = "distilled"
    """One of `registry.FEW_STEP`: a consistency model keeps its boundary."""
    own_steps: tuple[int, ...] = ()
    """The step counts that it was distilled or is advised for; empty for any."""
    guidance_up_to: float = 1.0
    """The highest guidance that its authors or users advise."""
    native_px: int | None = None
    """The side of its pictures; None for that of the base family."""
    parameterisation: str | None = None
    """What its network predicts; None for what the base predicts."""
    start_timestep: int | None = None
    """The timestep that it starts from, where that is not the last."""
    named_steps: bool = False
    """Whether a step count in the file's name replaces the profile's."""

    def run(self, native_px: int) -> Defaults:
        """The defaults on a model of that size."""
        return replace(self.defaults, tile_px=native_px, overlap_px=native_px // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A profile that a name tells."""

    profile: Profile
    words: tuple[str, ...]
    """What in the name told it."""
    where: str
    """Which name: the file's, the folder's, the repository's or that in its metadata."""
    others: tuple[str, ...] = ()
    """What else in the name would tell another profile or another number of steps."""

    @property
    def reason(self) -> str:
        """Such as "'hyper' and '4step' in its name, which also says 'lightning'"."""
        also = f", which also says {' and '.join(map(repr, self.others))}" if self.others else ""
        return f"{' and '.join(map(repr, self.words))} in {self.where}{also}"


def word(expression: str) -> str:
    """An expression that matches only where no letter stands before or after it."""
    return rf"(?<![a-z])(?:{expression})(?![a-z])"


def _run(sampler: str, schedule: str, steps: int, guidance: float = 1.0, relay: Relay | None = None) -> Defaults:
    """A profile's run; later stages take half the steps from timestep 499, which every even trailing list holds."""
    own = relay or Relay(steps=(max(1, steps // 2),), guidance=guidance, sigma=TURBO_RELAY)
    return Defaults(
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        guidance=guidance,
        relay_sigma=own.sigma,
        relay_steps=own.steps,
        relay_guidance=own.guidance,
        tile_px=1024,
        overlap_px=256,
        enlarger=("pixel",),
    )


def _one(sampler: str, sigma: float) -> Defaults:
    """A run of one step; later stages take theirs from the only level that the network knows."""
    return _run(sampler, "trailing", 1, 1.0, Relay(steps=(1,), guidance=1.0, sigma=sigma))


LCM_RELAY = Relay(steps=(2,), guidance=1.0)
MERGE_RELAY = Relay(steps=(3,), guidance=1.0)
LAST_SIGMA, SIGMA_800, SIGMA_399 = 14.6146, 5.1110, 1.1606  # of SDXL's timesteps 999, 800, 399
SD = ("sdxl", "sd15")
FOR_SD = r"(?<![a-z])sd"
"""What a LoRA's name holds beside 'lightning' or 'hyper' where it gives no step count: a style may be called so too."""
LIGHTNING, DMD2, TCD, PCM = word("lightning"), word("dmd2?"), word("tcd"), word("pcm")
HYPER = r"(?<![a-z])hyper(?![a-z])(?![-_ ]*(?:real|detail|photo|focus|style|surreal))"
LCM = word(r"lcm|vega[-_ ]?rt")
FLASH = r"(?<![a-z])flash[-_ ]?(?:sdxl|sd|pixart)(?![a-z])"
SDXL_FLASH = r"(?<![a-z])sdxl[-_ ]?flash(?![a-z])"
SAI_TURBO = r"(?<![a-z])sd_?xl[-_ ]?turbo(?=$|[-_. ]*(?:v?\d|fp|bf|unet|lora))"
UNCOUNTED_HYPER = Rule(word=HYPER, also=FOR_SD, only="lora")
UNCOUNTED_LIGHTNING = Rule(word=LIGHTNING, also=FOR_SD, only="lora")
TRAILING = {"lightning": ("SDXL-Lightning", ("sdxl",)), "hyper": ("Hyper-SD", SD)}
SMALL, NORMAL = r"small[-_ ]?cfg", r"normal[-_ ]?cfg"


def _trailing(kind: str, steps: int, names: tuple[str, ...], *rules: Rule) -> Profile:
    """A checkpoint of progressive distillation: Euler, which is DDIM, on trailing timesteps of its own count."""
    title, bases = TRAILING[kind]
    return Profile(
        name=f"{kind}-{steps}",
        title=f"{title}, {steps} steps",
        names=names,
        rules=rules,
        bases=bases,
        defaults=_run("euler", "trailing", steps),
        own_steps=(steps,),
    )


def _hyper_cfg(steps: int) -> Profile:
    return Profile(
        name=f"hyper-cfg-{steps}",
        title=f"Hyper-SD with guidance, {steps} steps",
        names=(f"Hyper-SDXL-{steps}steps-CFG-lora",),
        rules=(Rule(word=HYPER, also=r"cfg", steps=(steps,)),),
        bases=SD,
        defaults=_run("euler", "trailing", steps, 5.0),
        own_steps=(steps,),
        guidance_up_to=8.0,
    )


def _pcm(kind: str, steps: int, guidance: float, most: float, pattern: str) -> Profile:
    return Profile(
        name=f"pcm-{kind}-{steps}",
        title=f"PCM ({kind}), {steps} steps",
        names=(f"pcm_sdxl_{kind}_{steps}step_converted", f"pcm_sd15_{kind}_{steps}step_converted"),
        rules=(Rule(word=PCM, also=pattern, steps=(steps,)),),
        bases=SD,
        defaults=_run("euler", "trailing", steps, guidance),
        own_steps=(steps,),
        guidance_up_to=most,
    )


def _merge(kind: str, steps: int, pattern: str, names: tuple[str, ...], bases: tuple[str, ...] = ("sdxl",)) -> Profile:
    """A merge into a fine-tuned model: DPM++ SDE on Karras at guidance 2, as their authors run them."""
    return Profile(
        name=f"{kind}-merge",
        title=f"{kind.capitalize()} merge",
        names=names,
        rules=(Rule(word=pattern, only="model"),),
        bases=bases,
        defaults=_run("dpmpp_sde", "karras", steps, 2.0, MERGE_RELAY),
        own_steps=tuple(range(3, 9)),
        guidance_up_to=3.0,
        named_steps=True,
    )


def _lcm(name: str, title: str, names: tuple[str, ...], rule: Rule, sampler: str = "lcm") -> Profile:
    """A method that is run on the timesteps of an LCM."""
    run = _run(sampler, "lcm", 4, relay=LCM_RELAY)
    return Profile(name=name, title=title, names=names, rules=(rule,), bases=SD, defaults=run)


_PCM_ROWS = (
    _lcm(
        "pcm-lcmlike",
        "PCM (LCM-like)",
        ("pcm_sdxl_lcmlike_lora_converted", "pcm_sd15_lcmlike_lora_converted"),
        Rule(word=PCM, also=r"lcm[-_ ]?like"),
    ),
    *(_pcm("normalcfg", steps, scale, most, NORMAL) for steps, scale, most in ((4, 3.0, 3.5), (8, 4.5, 6.0), (16, 6.0, 9.0))),
    *(_pcm("smallcfg", steps, 1.0, 2.0, SMALL) for steps in (2, 4, 8, 16)),
)
_DMD2_ROWS = (
    Profile(
        name="dmd2-1",
        title="DMD2, 1 step",
        names=("dmd2_sdxl_1step_unet_fp16",),
        rules=(Rule(word=DMD2, steps=(1,)),),
        defaults=_one("lcm", SIGMA_399),
        own_steps=(1,),
        start_timestep=399,
    ),
    Profile(
        name="dmd2",
        title="DMD2, 4 steps",
        names=("dmd2_sdxl_4step_unet_fp16", "dmd2_sdxl_4step_lora_fp16"),
        rules=(Rule(word=DMD2),),
        defaults=_run("lcm", "trailing", 4),
        own_steps=(4,),
        guidance_up_to=1.8,
    ),
)
_HYPER_ROWS = (
    _hyper_cfg(8),
    _hyper_cfg(12),
    Profile(
        name="hyper-1-lora",
        title="Hyper-SD, the unified LoRA",
        names=("Hyper-SDXL-1step-lora", "Hyper-SD15-1step-lora"),
        rules=(Rule(word=HYPER, steps=(1,), also="lora"), Rule(word=HYPER, steps=(1,), only="lora")),
        bases=SD,
        defaults=_run("tcd", "lcm", 1),
        own_steps=tuple(range(1, 9)),
    ),
    Profile(
        name="hyper-1",
        title="Hyper-SD, 1 step",
        names=("Hyper-SDXL-1step-Unet", "Hyper-SDXL-1step-Unet-Comfyui.fp16"),
        rules=(Rule(word=HYPER, steps=(1,)),),
        bases=SD,
        defaults=_one("lcm", SIGMA_800),
        own_steps=(1,),
        start_timestep=800,
    ),
    _trailing("hyper", 2, ("Hyper-SDXL-2steps-lora",), Rule(word=HYPER, steps=(2,))),
    _trailing("hyper", 4, ("Hyper-SDXL-4steps-lora", "Hyper-SD15-4steps-lora"), Rule(word=HYPER, steps=(4,))),
    _trailing("hyper", 8, ("Hyper-SDXL-8steps-lora", "Hyper-SD15-8steps-lora"), Rule(word=HYPER, steps=(8,)), UNCOUNTED_HYPER),
    _merge("hyper", 6, HYPER, ("juggernautXL_hyper", "realisticVision_hyper"), SD),
)
_LIGHTNING_ROWS = (
    Profile(
        name="lightning-1",
        title="SDXL-Lightning, 1 step",
        names=("sdxl_lightning_1step_x0", "sdxl_lightning_1step_unet_x0"),
        rules=(Rule(word=LIGHTNING, also=word("x0"), only="model"), Rule(word=LIGHTNING, steps=(1,), only="model")),
        defaults=_one("euler", LAST_SIGMA),
        own_steps=(1,),
        parameterisation="x0",
    ),
    _trailing("lightning", 2, ("sdxl_lightning_2step", "sdxl_lightning_2step_lora"), Rule(word=LIGHTNING, steps=(2,))),
    _trailing("lightning", 8, ("sdxl_lightning_8step", "sdxl_lightning_8step_lora"), Rule(word=LIGHTNING, steps=(8,))),
    _trailing(
        "lightning",
        4,
        ("sdxl_lightning_4step", "sdxl_lightning_4step_lora"),
        Rule(word=LIGHTNING, steps=(4,)),
        UNCOUNTED_LIGHTNING,
    ),
    _merge("lightning", 6, LIGHTNING, ("juggernautXL_lightning", "RealVisXL_V4.0_Lightning", "dreamshaperXL_lightningDPMSDE")),
)
_TURBO_ROWS = (
    Profile(
        name="turbo",
        title="SDXL-Turbo",
        names=("sd_xl_turbo_1.0_fp16", "sdxl-turbo"),
        rules=(Rule(word=SAI_TURBO),),
        defaults=_run("euler_ancestral", "trailing", 4),
        few_step="turbo",
        own_steps=(1, 2, 3, 4),
        native_px=512,
    ),
    _merge("turbo", 5, word("turbo"), ("dreamshaperXL_v21TurboDPMSDE", "sdxl_turboVisionXL")),
)
_ROWS = (
    *_PCM_ROWS,
    _lcm("tcd", "TCD", ("TCD-SDXL-LoRA", "TCD-SD15-LoRA"), Rule(word=TCD), "tcd"),
    *_DMD2_ROWS,
    Profile(
        name="sdxl-flash",
        title="SDXL Flash",
        names=("SDXL-Flash", "sdxl-flash-mini"),
        rules=(Rule(word=SDXL_FLASH),),
        defaults=_run("dpmpp_sde", "trailing", 7, 3.0, Relay(steps=(3,), guidance=1.0, sigma=TURBO_RELAY)),
        own_steps=tuple(range(6, 10)),
        guidance_up_to=3.5,
    ),
    replace(
        _lcm("flash", "Flash Diffusion", ("flash-sdxl", "flash-sd", "flash-pixart"), Rule(word=FLASH)),
        bases=(*SD, "pixart-alpha-1024"),
        own_steps=(4,),
    ),
    *_HYPER_ROWS,
    *_LIGHTNING_ROWS,
    replace(
        _lcm("lcm", "LCM", ("lcm-sdxl", "lcm-lora-sdxl", "lcm_lora_sdv1-5", "Segmind-VegaRT"), Rule(word=LCM)),
        few_step="lcm",
        own_steps=tuple(range(1, 9)),
        guidance_up_to=2.0,
    ),
    *_TURBO_ROWS,
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _ROWS}
"""Every profile by name; of several that a name tells, the first counts."""


def find_profile(name: str) -> Profile:
    """The profile of a name. RequestError, with the known names, for an unknown one."""
    if name not in PROFILES:
        raise RequestError(f"few_step: {unknown('profile', name, (*PROFILES, NONE))}")
    return PROFILES[name]


def match(names: Iterable[tuple[str, str]], kind: str) -> Match | None:
    """The profile that the first telling name of (name, where it stands) tells; kind: 'model' or 'lora'."""
    for name, where in names:
        text = apart(name)
        told = [(profile, words) for profile in _ROWS for rule in profile.rules if (words := rule.words(text, kind))]
        if told:
            profile, words = _named_steps(told[0][0], text), told[0][1]
            counts = [(found[0], int(found[1]) == profile.defaults.steps) for found in STEPS.finditer(text)]
            followed = tuple(count for count, same in counts if same)
            rest = [*(others[0] for _, others in told), *(count for count, same in counts if not same)]
            others = (word for word in rest if not any(word in known for known in words))
            return Match(profile=profile, words=(*words, *followed[:1]), where=where, others=tuple(dict.fromkeys(others)))
    return None


def _named_steps(profile: Profile, text: str) -> Profile:
    """The profile with the steps that the name gives, where those are free."""
    found = STEPS.search(text)
    steps = 0 if found is None else int(found[1])
    if not profile.named_steps or not 1 <= steps <= MOST_NAMED:
        return profile
    return replace(profile, defaults=replace(profile.defaults, steps=steps), own_steps=(steps,))


def apart(name: str) -> str:
    """A name in lower case, its words apart: dreamshaperXL_v21TurboDPMSDE is 'dreamshaper xl_v21 turbo dpmsde'."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", " ", name)
    return name.lower()


def names_of(path: Path, metadata: Mapping[str, object]) -> Sequence[tuple[str, str]]:
    """The names that may tell a file's or folder's profile, and where they stand, the nearest first."""
    names = [(path.name if path.is_dir() else path.stem, "its name")]
    if not path.is_dir() and path.name.split(".")[0] in NAMELESS:
        names.append((path.parent.name, "its folder's name"))
    names += [(str(metadata[key]), f"its metadata ({key})") for key in TITLES if metadata.get(key)]
    repositories = (part.removeprefix("models--").replace("--", "/") for part in path.parts if part.startswith("models--"))
    return [*names, *((name, "its repository's name") for name in repositories)]

"""Hill climbing over knobs: one step of one knob at a time, kept where it pays. What was measured is written down as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidepool.bench.tuning.knobs import Knobs, Steps, neighbour
from sidepool.wire.durable import replace_text
from sidepool.wire.errors import ConfigError

# A step must pay this much: less is noise.
GAIN = 1.05

Score = Callable[[Knobs, float], float]
"""`score(knobs, beat)`: requests per second within the limit, or 0 where they are below `GAIN` times `beat`."""


@dataclass
class Climb:
    """A climb and its memory. Its course follows from the scores alone: one that is resumed repeats none and goes on."""

    starts: Sequence[Knobs]
    steps: Steps
    score: Score
    state: Path
    about: dict[str, Any]
    """What the scores depend on beside knobs: a state that was written for something else is refused."""
    may_go_on: Callable[[], bool] = lambda: True
    """Asked before each measurement: False ends the climb where it is."""
    told: Callable[[str], None] = lambda text: None
    tried: dict[Knobs, float] = field(default_factory=dict)
    best: Knobs | None = None
    finished: bool = False

    def run(self) -> Knobs:
        """Climb to where no step pays, or until it may not go on; returns the best setting. Raises `ConfigError` for the state."""
        self._read()
        for knobs in dict.fromkeys(start.settled() for start in self.starts):
            self._take(knobs)
        climbing = True
        while climbing:
            climbing = False
            for name in self.steps:
                climbing |= self._climb_along(name)
        self.finished = self.may_go_on()
        self._write()
        return self._top

    @property
    def best_score(self) -> float:
        return 0.0 if self.best is None else self.tried[self.best]

    @property
    def _top(self) -> Knobs:
        assert self.best is not None, "a climb has a start"
        return self.best

    def _climb_along(self, name: str) -> bool:
        """Whether a step of this knob paid; further ones in its direction are tried at once."""
        return any(self._climb_towards(name, upwards) for upwards in (True, False))

    def _climb_towards(self, name: str, upwards: bool) -> bool:
        paid = False
        while (candidate := neighbour(self._top, name, self.steps, upwards)) is not None and self._take(candidate.settled()):
            paid = True
        return paid

    def _take(self, knobs: Knobs) -> bool:
        """Measure, unless that was done; whether it is the best now."""
        known = self.tried.get(knobs)
        if known is None:
            if self.best is not None and not self.may_go_on():
                return False
            beat = self.best_score
            known = self.score(knobs, beat)
            self.tried[knobs] = known
            self._write()
            score = f"{known:8.1f}/s" if known else "   no gain"
            self.told(f"{score}  {_difference(knobs, self.best)}")
        if self.best is None or (known >= GAIN * self.best_score and known > 0):
            changed = knobs != self.best
            self.best = knobs
            return changed
        return False

    def _read(self) -> None:
        if not self.state.exists():
            return
        try:
            known = json.loads(self.state.read_text(encoding="utf-8"))
            about, tried = known["about"], {Knobs(**t["knobs"]): float(t["rate"]) for t in known["tried"]}
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"{self.state}: not the state of a climb: {e}; remedy: remove it") from e
        if about != self.about:
            differs = ", ".join(key for key in self.about if about.get(key) != self.about[key]) or "something else"
            raise ConfigError(f"{self.state}: was measured under another {differs}; remedy: another state file, or remove it")
        self.tried = tried

    def _write(self) -> None:
        tried = [{"knobs": knobs.as_json(), "rate": rate} for knobs, rate in self.tried.items()]
        state = {"about": self.about, "finished": self.finished, "best": self.best and self.best.as_json(), "tried": tried}
        self.state.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.state, json.dumps(state, indent=1) + "\n")


def _difference(knobs: Knobs, best: Knobs | None) -> str:
    """What a setting has that the best so far has not."""
    base = {} if best is None else best.as_json()
    return "  ".join(f"{key} {value}" for key, value in knobs.as_json().items() if base.get(key) != value) or "as before"

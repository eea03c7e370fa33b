"""What an engine has done so far."""

from dataclasses import dataclass
from typing import final


@final
@dataclass
class Stats:
    """Counters of an engine, to be read at any time.

    Args:
      slots: rows that are decoded at once.
      rows: finished ones.
      prefill_tokens: of prompts, that were computed.
      shared_tokens: of prompts, that were copied from another slot instead.
      padded_tokens: as computed, with what fills the shapes up.
      decode_tokens: drawn for rows that were live.
      steps: of decoding, over all slots each: passes of the model.
      guessing_steps: those that took guesses.
      live_rows: rows that were live, over all steps.
      chunks: runs of the decode program.
      compiled: programs.
      compile_seconds: until all of them were there.
      seconds: of `run`, all of them together.
      waited: seconds that the host waited for the device.
      calls: seconds in which prompts were started, or computed where that is at once.
      between: seconds from a chunk's results until the next program was called, where
        none had been before: the device had nothing to do.
      restarts: after the device had run out of memory.
    """

    slots: int = 0
    rows: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    padded_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    guessing_steps: int = 0
    live_rows: int = 0
    chunks: int = 0
    compiled: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    calls: float = 0.0
    between: float = 0.0
    restarts: int = 0
    slot_steps: int = 0

    @property
    def occupancy(self) -> float:
        """Live rows of a decode step in terms of the slots, the mean of all steps."""
        return self.live_rows / max(self.slot_steps, 1)

    @property
    def tokens_a_pass(self) -> float:
        """New tokens of a live row in a decode step: 1, more where some are guessed."""
        return self.decode_tokens / max(self.live_rows, 1)

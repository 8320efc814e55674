"""Turns what the model process says into answer events: text, marks, log-probabilities, usage, report."""

from __future__ import annotations

import time
from dataclasses import dataclass

from longshore.detokenize import IncrementalText
from longshore.device.call import Call
from longshore.device.frames import Frame
from longshore.device.plan import ChoicePlan, Plan
from longshore.device.text import StudentText
from longshore.wire import (
    FinishEvent,
    FinishReason,
    Hop,
    Report,
    Segment,
    TokenEvent,
    TokenMark,
    usage_of,
)

NODE = "device"


@dataclass(frozen=True, slots=True)
class AnswerWriter:
    """Writes the events of one request; pure but for the clock."""

    plan: Plan
    text: StudentText
    model_digest: str

    def token(self, choice: ChoicePlan, detokenizer: IncrementalText, frame: Frame) -> TokenEvent | None:
        """The event of one token; None for a stop token, which ends the answer and is not in it."""
        if frame.get("ending") == "stop":
            return None
        token_id = frame["token_id"]
        text, byte_offset, _ = detokenizer.push(token_id)
        mark = TokenMark(
            segment=self.plan.segment,
            offset=choice.offset + frame["offset"] - len(choice.generated),
            token_id=token_id,
            byte_offset=choice.byte_offset + byte_offset,
            model_digest=self.model_digest,
        )
        logprob = None
        if "logprob" in frame:
            logprob = self.text.logprob(token_id, frame["logprob"], frame["top_logprobs"])
        return TokenEvent(mark, text, choice.index, logprob)

    def finish(self, choice: ChoicePlan, reason: FinishReason, rest: str, call: Call) -> FinishEvent:
        """The end of a choice, with usage and report where it is the last."""
        if choice is not self.plan.choices[-1]:
            return FinishEvent(reason, choice.index, rest)
        num_tokens = self.plan.choices[0].offset + call.num_tokens  # of the whole answer, wherever it began
        usage = usage_of(self.plan.num_prompt_tokens, num_tokens, call.num_cached)
        return FinishEvent(reason, choice.index, rest, usage, self._report(call))

    def _report(self, call: Call) -> Report:
        now_s = time.monotonic()
        ttft_ms = None if call.first_token_s is None else (call.first_token_s - call.arrived_s) * 1e3
        queue_ms = ((call.begun_s or now_s) - call.arrived_s) * 1e3
        hop = Hop("device", NODE, queue_ms, ttft_ms, (now_s - call.arrived_s) * 1e3)
        offset = self.plan.choices[0].offset
        return Report(
            request_id=self.plan.request_id,
            served_by="device",
            node=NODE,
            model_digest=self.model_digest,
            resumed=self.plan.resumed,
            hops=(hop,),
            segments=(Segment(self.plan.segment, "device", NODE, self.model_digest, offset),),
            images=tuple(image.use for image in self.plan.images),
        )

"""The engine: schedule → run → postprocess. No gradio, no plotting; the scheduler knows no torch."""

from flora.engine.engine import Agreement, Engine
from flora.engine.generation import Generation
from flora.engine.request import Completion, FinishEvent, Request, TokenEvent

__all__ = ["Agreement", "Completion", "Engine", "FinishEvent", "Generation", "Request", "TokenEvent"]

"""The engine: schedule → run → postprocess. No gradio, no plotting; the scheduler knows no torch."""

from flora.engine.core import RequestTimes
from flora.engine.engine import Agreement, Engine, EngineSnapshot
from flora.engine.generation import Generation
from flora.engine.request import Completion, FailEvent, FinishEvent, Request, TokenEvent
from flora.engine.server import Ticket

__all__ = [
    "Agreement",
    "Completion",
    "Engine",
    "EngineSnapshot",
    "FailEvent",
    "FinishEvent",
    "Generation",
    "Request",
    "RequestTimes",
    "Ticket",
    "TokenEvent",
]

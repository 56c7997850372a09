"""Queues a workflow at ComfyUI's server and waits for its end: run by ComfyUI's own Python.

comfyui_client.py ADDRESS STOP_AT reads the workflow from its input; at so many updates of the
progress bar it interrupts (0: never). It prints {"progress": [[value, total]], "previews": [JPEG in
base 64], "prompt_id": text}, or {"refused": text}.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import aiohttp

ENDS = ("execution_success", "execution_error", "execution_interrupted")


async def queued(address: str, graph: dict[str, Any], stop_at: int) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(address) as session,
        session.ws_connect("/ws?clientId=test", max_msg_size=0) as events,
    ):
        body = {"prompt": graph, "client_id": "test"}
        async with session.post("/prompt", json=body) as answer:
            told = await answer.json()
        if "prompt_id" not in told:
            return {"refused": json.dumps(told)}
        found = await followed(session, events, stop_at)
    return {**found, "prompt_id": told["prompt_id"]}


async def followed(session: Any, events: Any, stop_at: int) -> dict[str, Any]:
    progress: list[list[int]] = []
    previews: list[str] = []
    async for message in events:
        if message.type == aiohttp.WSMsgType.BINARY:
            jpeg = message.data[message.data.index(b"\xff\xd8") :]
            previews.append(base64.b64encode(jpeg).decode())
            continue
        event = json.loads(message.data)
        if event["type"] == "progress":
            progress.append([event["data"]["value"], event["data"]["max"]])
            if len(progress) == stop_at:
                await session.post("/interrupt")
        if event["type"] in ENDS:
            break
    return {"progress": progress, "previews": previews}


if __name__ == "__main__":
    _, address, stop_at = sys.argv
    print(json.dumps(asyncio.run(queued(address, json.load(sys.stdin), int(stop_at)))))

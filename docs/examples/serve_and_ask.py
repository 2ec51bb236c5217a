"""Serve a model directory on this machine and ask it with the `openai` client, as any program would.

python docs/examples/serve_and_ask.py runs/novel
"""

import subprocess
import sys
import time

import httpx
import openai


def main(model: str, port: int = 8000) -> str:
    """Start `warploom serve`, complete a text, chat with streaming, and stop the server."""
    command = [sys.executable, "-m", "warploom.engine.cli", "serve", model, "--port", str(port), "--no-ui"]
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, server)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        text = client.completions.create(model=name, prompt="The empire", max_tokens=20, temperature=0).choices[0].text
        messages = [{"role": "user", "content": "Who are you?"}]
        for chunk in client.chat.completions.create(model=name, messages=messages, max_tokens=20, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        return text
    finally:
        server.terminate()  # it finishes what is under way
        server.wait()


def wait_ready(url: str, server: subprocess.Popen) -> None:
    """Return once the server has loaded its model; `/health` answers 503 until then."""
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:  # it does not listen yet
            pass
        time.sleep(0.1)
    raise SystemExit("the server ended before it was ready: see its message above")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))

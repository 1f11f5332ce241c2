"""Start `glidecape serve` on the shipped pair, ask it with OpenAI's client, and stop it.

pip install -e '.[serve]' openai
python examples/serve_openai.py                               # in a checkout
python examples/serve_openai.py path/to/model path/to/draft  # your own
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import openai
import typer

SHIPPED = Path(__file__).parents[1] / "models" / "pysource"


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/target",
    draft: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/glide",
) -> None:
    """Serve a pair, and ask it with OpenAI's client."""
    # Port 0 is any free one. When the server is ready, it logs a line with its address.
    command = [sys.executable, "-m", "glidecape", "serve", model, "--draft", draft, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            logged = (json.loads(line) for line in server.stderr if line.startswith("{"))
            url = next(entry["url"] for entry in logged if entry["event"] == "serving")
            ask(openai.OpenAI(base_url=url, api_key="none"))
        finally:
            server.terminate()  # answers that are being made may end


def ask(client: openai.OpenAI) -> None:
    """One answer whole, and one as it is made."""
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt="def add(a, b):", max_tokens=16, temperature=0)
    print("whole:", repr(whole.choices[0].text))
    pieces = client.completions.create(model=model, prompt="def add(a, b):", max_tokens=16, temperature=0, stream=True)
    print("streamed:", repr("".join(piece.choices[0].text for piece in pieces)))
    details = whole.usage.completion_tokens_details if whole.usage else None
    print("drafted tokens that were accepted:", details.accepted_prediction_tokens if details else None)


if __name__ == "__main__":
    typer.run(main)

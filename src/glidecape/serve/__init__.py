"""The HTTP server: OpenAI's interface over the decode loop. `glidecape[serve]` brings the libraries it needs."""

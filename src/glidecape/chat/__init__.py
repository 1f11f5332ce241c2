"""`glidecape chat`: a conversation in the terminal, with a local pair or a server."""

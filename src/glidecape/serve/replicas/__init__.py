"""The server on several replicas: each is the whole server of `serve/`, and Ray Serve starts them and routes to them."""

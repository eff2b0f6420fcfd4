"""The HTTP server: `/predict` and OpenAI's API around a generation worker. See `application.create_app`."""

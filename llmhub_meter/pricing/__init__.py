"""What a model costs, and what a request's usage comes to."""

"""From a model to its rewritten graph: Dynamo, functional ATen, the passes, compiled pieces."""

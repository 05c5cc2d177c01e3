"""The endpoint: a promoted bundle behind the OpenAI chat completions protocol, on Ray Serve.

    client --HTTP--> Ingress (key, schema, limits; no torch) --handle--> ModelReplica (images, batches, the model)

`deploy.start` brings it up, `client.ask` asks it; `app.build` is the same application for `serve run` and
`serve deploy`.
"""

"""The endpoint: every bundle of the registry over one base behind the OpenAI chat completions protocol, on Ray Serve.

    client --HTTP--> Ingress (keys, limits, catalogue, page; no torch) --handle--> ModelReplica (`engine`: the model)

`deploy.start` brings it up, `client.Client` asks it, `proof` shows that it answers with what was promoted; `app.build`
is the same application for `serve run` and `serve deploy`. What passes between the two sides is in `contract`.
"""

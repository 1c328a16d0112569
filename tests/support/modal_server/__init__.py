"""An offline stand-in for Modal's servers, as much of them as our jobs use.

The `modal` command line and the container code of the installed `modal` package run against it unchanged. Functions run in
processes of their own, which see the files that were uploaded and the packages of this environment, never this folder; Volumes
have commits; containers can be preempted. Images are recorded, not built, and containers have no GPU.

    server       listens, hands each request to the part that answers it
    apps         apps, what their containers print
    functions    functions, classes, images, secrets
    calls        inputs and outputs
    containers   when containers start and stop, what they request
    volumes      committed files, working copies
    store        uploaded files and blobs
    processes    containers' processes, which `support.warm` starts
"""

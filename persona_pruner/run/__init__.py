import os

# Ray starts a local cluster for whoever touches it unconnected, also a thread that outlives the job. Read when ray is
# imported, which the modules of this package do in any order.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

"""A stand-in for the vendor's library: its names, and plans that say what they were asked for."""

import enum
import json
import os
import signal
import time
from types import ModuleType

GPU_NAME = "NVIDIA Fake 9000"


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    VERBOSE = 4


class Logger:
    ERROR, INTERNAL_ERROR = Severity.ERROR, Severity.INTERNAL_ERROR


class Monitor:
    pass


class NetworkFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    REFIT = 1
    REQUIRE_USER_ALLOCATION = 2


class Level(enum.Enum):
    SAME_COMPUTE_CAPABILITY = 2


Capability = enum.Enum("Capability", ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])


class Network:
    graph = None


class Parser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        self.network.graph = path
        return True


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, opt, high):
        if not all(map(lambda a, b, c: a <= b <= c, low, opt, high)):
            raise ValueError("min <= opt <= max does not hold")
        self.shapes[name] = [low, opt, high]


class Cache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"+"


class Config:
    num_compute_capabilities = 0
    hardware_compatibility_level = None
    progress_monitor = None
    cache = None

    def __init__(self):
        self.flags, self.capabilities, self.profiles = [], {}, []

    def set_flag(self, flag):
        self.flags.append(flag.name)

    def set_compute_capability(self, capability, index):
        self.capabilities[index] = capability.name

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return Cache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return not cache.data.startswith(b"other machine")


class FakeTensorRT(ModuleType):
    """The module.

    Attributes:
        configs: One a finished build.
        complaint: What the logger is told before a build answers None; "" lets builds succeed.
        is_interrupted: Whether Ctrl-C arrives during a build, which goes on until it is cancelled.
    """

    ILogger, IProgressMonitor = Logger, Monitor
    NetworkDefinitionCreationFlag, BuilderFlag = NetworkFlag, BuilderFlag
    HardwareCompatibilityLevel, ComputeCapability = Level, Capability
    OnnxParser = Parser

    def __init__(self, name="tensorrt", version="11.4.0.106"):
        super().__init__(name)
        self.__version__ = version
        self.configs, self.complaint, self.is_interrupted = [], "", False

    def Builder(self, logger):  # noqa: N802  (the vendor's name)
        return Builder(self, logger)


class Builder:
    def __init__(self, module, logger):
        self.module, self.logger = module, logger

    def create_network(self, flags):
        assert flags == 1 << int(NetworkFlag.STRONGLY_TYPED)
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing", "Building engine", 4)
        if self.module.is_interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        while self.module.is_interrupted:
            if not monitor.step_complete("Timing", 0):
                self.logger.log(Severity.ERROR, "BuildCanceled")
                return None
            time.sleep(0.005)
        monitor.phase_finish("Timing")
        monitor.step_complete("Building engine", 1)
        monitor.phase_finish("Building engine")
        if self.module.complaint:
            self.logger.log(Severity.VERBOSE, "trying")
            self.logger.log(Severity.ERROR, self.module.complaint)
            self.logger.log(Severity.ERROR, "CUDA driver version is insufficient for CUDA")
            return None
        self.module.configs.append(config)
        asked = [config.flags, config.capabilities, config.profiles, len(self.module.configs)]
        return json.dumps(asked).encode()

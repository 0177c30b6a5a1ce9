"""TorchServe's handler of every model that computes: it has the device's engine load it, and hands requests on."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

from engine.settings import settings_of
from handlers.answers import body_of, quiet_logs, respond
from handlers.engine_link import EngineLink
from luna_protocol.answer import Answer
from luna_protocol.errors import Broken, EngineEnded, LunaError
from luna_protocol.model_names import without_first

log = logging.getLogger(__name__)

_KINDS = {"counter": MetricTypes.COUNTER, "gauge": MetricTypes.GAUGE, "histogram": MetricTypes.HISTOGRAM}
_BATCH = 64  # rows that TorchServe hands over at most


class Relay:
    """One TorchServe worker. A second worker of the same model shares what the first has loaded."""

    def initialize(self, context) -> None:
        """Returns once the engine has the model, or knows why not. Never raises, because TorchServe would keep
        restarting the worker and tell no client why: every request is answered with the reason."""
        quiet_logs()
        self._metrics, self._name = context.metrics, context.model_name
        self.failure = ""
        try:
            handler = context.model_yaml_config["handler"]
            gpu = context.system_properties.get("gpu_id")
            name = without_first(f"{context.model_name}/{context.manifest['model']['modelVersion']}")
            self._engine = EngineLink(
                settings_of(handler).roots.run,
                "cpu" if gpu is None else str(gpu),
                name,
                handler,
                float(context.model_yaml_config.get("responseTimeout", 600)),
                self._report,
            )
            self._model = name
            self._rows = ThreadPoolExecutor(_BATCH, thread_name_prefix="row")
        except Exception as error:
            log.exception("%s did not start", context.model_name)
            self.failure = f"{type(error).__name__}: {error}"

    def handle(self, data: list[dict[str, Any]], context) -> list[bytes]:
        """One reply per row of `data`."""
        if self.failure:
            failure = Broken(f"the model did not load: {self.failure}", "fix the cause, then load the model again")
            answers = [Answer.of_error(failure)] * len(data)
        elif len(data) == 1:
            answers = [self._ask(data[0], _client(context, 0))]
        else:
            clients = [_client(context, index) for index in range(len(data))]
            answers = list(self._rows.map(self._ask, data, clients))
        return [respond(answer, context, index) for index, answer in enumerate(answers)]

    def _ask(self, row: dict[str, Any], client: str) -> Answer:
        body = body_of(row)
        parsed = not isinstance(body, bytes | bytearray)
        header = {"op": "predict", "model": self._model, "client": client, "json": parsed}
        try:
            connection = self._engine.borrow()
            try:
                connection.send(header, json.dumps(body).encode() if parsed else body)
                told, answer = connection.receive()
            except (OSError, EOFError) as error:
                connection.close()
                raise EngineEnded(f"the engine of {self._model} ended on this request", "see its log", 0.5) from error
        except LunaError as error:
            return Answer.of_error(error)
        self._engine.give_back(connection)
        return Answer(told["status"], told["content_type"], answer, told["reason"], told["retry_after"])

    def _report(self, metrics: list[dict[str, Any]]) -> None:
        for each in metrics:
            labels = {"ModelName": self._name, "Level": "Model"} | each["labels"]
            dimensions = [Dimension(label, text) for label, text in labels.items()]
            kind = _KINDS[each["kind"]]
            self._metrics.add_metric(each["name"], each["value"], each["unit"], dimensions=dimensions, metric_type=kind)


def _client(context, index: int) -> str:
    return context.get_request_header(index, "Luna-Session") or ""

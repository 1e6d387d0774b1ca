"""Lower bounds on ε, by attacks: what a training reveals at least, beside what is claimed that it reveals at most."""

from lightning_dp.audit.bounds import Audit
from lightning_dp.audit.one_run import audit_mechanism, audit_training
from lightning_dp.audit.report import write_audits
from lightning_dp.audit.step import audit_module, audit_step

__all__ = ["Audit", "audit_mechanism", "audit_module", "audit_step", "audit_training", "write_audits"]

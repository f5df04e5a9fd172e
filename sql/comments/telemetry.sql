-- What \df+ jobqueue.* shows of sql/functions/trace.sql.

comment on function jobqueue.are_only_traced is 'Whether every element of send_many has no option but trace_context.';
comment on function jobqueue.is_only_traced is 'Whether options say nothing but where the job comes from.';
comment on function jobqueue.is_trace_context is 'Whether a value can be stored as trace context; null is none.';
comment on function jobqueue.trace_context is 'Where a job comes from, as W3C trace context, or null: the trace to look for in the tracing system. Errors: JQ404.';
comment on function jobqueue.trace_option is 'The option trace_context as it is stored, or null. Errors: JQ400.';
comment on function jobqueue.with_trace_context is 'Jobs for send_many or send_flow, each with this trace context unless it has one of its own.';

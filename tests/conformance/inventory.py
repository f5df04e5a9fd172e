"""The names of what pg-boss 12.38 offers: functions, options, commands, states, policies and test files.

Only names. What each means here is in docs/pg-boss.toml, and a test sees to it that none is missing there.
"""

from __future__ import annotations

RETRIES = "retryLimit retryDelay retryBackoff retryDelayMax expireInSeconds"
RETRIES += " retentionSeconds deleteAfterSeconds heartbeatSeconds"

FUNCTIONS: dict[str, str] = {
    "new PgBoss": "", "start": "attempts", "stop": "close graceful timeout", "isInstalled": "", "schemaVersion": "",
    "getDb": "",
    "detectSchemaDrift": "", "isMaintaining": "", "isBamWorking": "", "isResolvingFlow": "", "isCheckingSkew": "",
    "isTimekeeping": "", "getConstructionPlans": "", "getMigrationPlans": "", "getRollbackPlans": "", "getUninstallPlans": "",
    "getIndexBloatPlans": "", "states": "", "policies": "", "events": "", "scheduleKinds": "", "scheduleMissedPolicies": "",
    "previewScheduleMaxCount": "", "addBins": "", "percentile": "", "fromKnex": "", "fromKysely": "", "fromDrizzle": "",
    "fromPrisma": "", "fromPglite": "", "fromBunSql": "", "systemClock": "", "TestClock": "", "enableClockOverride": "",
    "disableClockOverride": "",
    "PgBoss": "connectionString host port database user password ssl options max application_name connectionTimeoutMillis db"
    " schema createSchema migrate backend supervise schedule superviseIntervalSeconds monitorIntervalSeconds"
    " queueCacheIntervalSeconds maintenanceIntervalSeconds reindexIntervalSeconds bamIntervalSeconds flowIntervalSeconds"
    " cronMonitorIntervalSeconds cronWorkerIntervalSeconds clockMonitorIntervalSeconds useListenNotify"
    " notifyHeartbeatIntervalMs notifyHeartbeatTimeoutMs notifyKeepAliveInitialDelayMs warningSlowQuerySeconds"
    " warningQueueSize persistWarnings warningRetentionDays persistQueueStats queueStatRetentionDays reindex monitorVacuum"
    " registerInstance instanceName instanceHeartbeatSeconds openTelemetry clock __test__enableSpies",
    "createQueue": f"policy partition deadLetter warningQueueSize notify {RETRIES}", "updateQueue": "", "deleteQueue": "",
    "getQueues": "", "getQueue": "", "getQueueStats": "from to limit bucketSeconds maxDataPoints aggregate percentiles force",
    "deleteQueuedJobs": "", "deleteStoredJobs": "", "deleteAllJobs": "", "getBlockedKeys": "limit after",
    "send": f"id priority startAfter singletonKey singletonSeconds singletonNextSlot group deadLetter db {RETRIES}",
    "sendAfter": "", "sendThrottled": "", "sendDebounced": "", "insert": "db returnId", "update": "id singletonKey match",
    "upsert": "", "flow": "ref dependsOn db", "getDependencies": "limit after", "getDependents": "", "publish": "",
    "subscribe": "", "unsubscribe": "",
    "fetch": "batchSize includeMetadata ignoreStartAfter minPriority maxPriority groupConcurrency ignoreGroups db",
    "work": "pollingIntervalSeconds notifyPollingIntervalSeconds burstWhenReadyExceeds burstWhenBatchFull batchSize"
    " localConcurrency localGroupConcurrency groupConcurrency heartbeatRefreshSeconds perJobResults transactional"
    " transactionTimeoutSeconds minPriority maxPriority includeMetadata",
    "job.signal": "", "offWork": "id wait", "notifyWorker": "", "getWipData": "", "complete": "includeQueued", "fail": "",
    "cancel": "", "resume": "", "retry": "", "deleteJob": "", "touch": "", "attempts": "id retryCount",
    "redrive": "destination sourceName data createdBefore ids limit", "previewRedrive": "",
    "findJobs": "id key data queued limit after", "getJobById": "", "schedule": "tz key missed db", "unschedule": "",
    "getSchedules": "", "getSchedule": "", "previewSchedule": "tz from count", "supervise": "", "resolveFlow": "",
    "getReindexCommands": "", "getInstances": "", "getBamStatus": "", "getBamEntries": "", "getSpy": "", "clearSpies": "",
    "error": "", "warning": "", "wip": "", "stopped": "", "bam": "", "flow event": "", "cli migrate": "", "cli create": "",
    "cli version": "", "cli doctor": "", "cli plans": "", "cli reindex": "", "cli rollback": "", "sql insert": "",
    "sql create_queue": "", "sql delete_queue": "", "proxy": "", "dashboard": "",
}  # fmt: skip

STATES = ("created", "retry", "active", "completed", "cancelled", "failed")
POLICIES = ("standard", "short", "singleton", "stately", "exclusive", "key_strict_fifo")

_TEST_FILES = """
activityTest adapterTest adapterTypeTest advisoryLockFreeTest attemptFenceTest backgroundErrorTest bamTest
bindAuditRulesTest bunAdapterTest bunSqlTest cancelTest claimFencingTest claimTimerTest cliTest clockTest completeTest
concurrencyGroupTest concurrencyLocalGroupFetchTest concurrencyLocalGroupTest concurrencyLocalGroupTierTest
concurrencyTest configTest coverageTest databaseTest dbListenTest delayTest deleteTest distributedDatabaseTest
driftTest drizzleArrayParamTest eslintClockGuardTest expireTest failureTest fetchTest findJobsTest flowTest
groupConcurrencyPlanReproTest handlerOverrunTest heartbeatTest insertTest instanceTest keyStrictFifoTest latencyTest
lifecycleTest listLimitTest listenNotifyTest migrationTest moduleTest monitorBackoffTest monitorVacuumTest
monitoringTest multiMasterTest navigatorTest notifierTest nurseTest openTelemetryTest opsTest perJobResultsTest
perJobResultsTypeTest pgliteAdapterTest pgliteTest placeholdersTest plansSnapshotTest priorityTest publishTest
queueCacheTest queueLockOrderTest queuePolicyTest queueStatsHistoryTest queueStatsTest queueTest readyHistoryTest
registrarTest reindexTest resumeTest retryTest rruleTest scheduleDbTest scheduleLastJobTest scheduleMissedTest
scheduleTest schemaQuotedNameTest sendTest serializeErrorTest slashQueueTest speedTest spyTest testClockTest
throttleTest toolsTest transactionalWorkTest updateTest upsertTest workBatchTest workLifecycleTest workTest
"""


def names() -> set[str]:
    """Return every function, and every option as "function.option"."""
    return {name for name in FUNCTIONS if name != "PgBoss"} | {
        f"{name}.{option}" for name, options in FUNCTIONS.items() for option in options.split()
    }


def test_files() -> list[str]:
    """Return the names of pg-boss's test files."""
    return _TEST_FILES.split()

# Postrider's queues, one per destination, their dead-letter queue, the two tables of its DynamoDB outbox, and the policies of the
# roles that use them. The same as what `postrider migrate` makes; see docs/aws.md.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

variable "queue_prefix" {
  description = "queue.sqs.prefix. Each destination's queue is PREFIX-DESTINATION, the dead-letter queue PREFIX-dead-letters."
  type        = string
  default     = "postrider"
}

variable "destinations" {
  description = "The names of the destinations: each has a queue."
  type        = set(string)
}

variable "fifo" {
  description = "Whether the queues are FIFO queues; their names then end in .fifo."
  type        = bool
  default     = false
}

variable "table_name" {
  description = "outbox.dynamodb.table. The ledger is NAME-ledger."
  type        = string
  default     = "postrider"
}

variable "inbound_queue_arn" {
  description = "The ARN of the queue of a feed with kind = \"sqs\", or null."
  type        = string
  default     = null
}

locals {
  suffix = var.fifo ? ".fifo" : ""
  # The dead-letter queue's ARN, with any name behind the prefix.
  queues = replace(aws_sqs_queue.dead.arn, "dead-letters${local.suffix}", "*")
}

resource "aws_sqs_queue" "dead" {
  name       = "${var.queue_prefix}-dead-letters${local.suffix}"
  fifo_queue = var.fifo
  # The longest there is: somebody has to look first.
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
  redrive_allow_policy      = jsonencode({ redrivePermission = "allowAll" })
}

# Hints alone: what a queue loses, or a queue that is made anew, is sent again.
resource "aws_sqs_queue" "queue" {
  for_each                  = var.destinations
  name                      = "${var.queue_prefix}-${each.key}${local.suffix}"
  fifo_queue                = var.fifo
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.dead.arn
    maxReceiveCount     = 1000
  })
}

resource "aws_dynamodb_table" "outbox" {
  name         = var.table_name
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "Digest"

  attribute {
    name = "Digest"
    type = "S"
  }

  ttl {
    attribute_name = "ExpiresAt"
    enabled        = true
  }
  point_in_time_recovery {
    enabled = true
  }

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_dynamodb_table" "ledger" {
  name         = "${var.table_name}-ledger"
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "Pk"
  range_key    = "Sk"

  attribute {
    name = "Pk"
    type = "S"
  }
  attribute {
    name = "Sk"
    type = "S"
  }
  attribute {
    name = "TopicShard"
    type = "S"
  }
  attribute {
    name = "Shard"
    type = "N"
  }
  attribute {
    name = "OutstandingCreatedTime"
    type = "N"
  }
  attribute {
    name = "LookAt"
    type = "N"
  }
  attribute {
    name = "DeliveryTime"
    type = "N"
  }

  global_secondary_index {
    name               = "Outstanding"
    hash_key           = "TopicShard"
    range_key          = "OutstandingCreatedTime"
    projection_type    = "INCLUDE"
    non_key_attributes = ["Topic", "Count", "Due"]
  }
  global_secondary_index {
    name               = "OutstandingAllTopics"
    hash_key           = "Shard"
    range_key          = "LookAt"
    projection_type    = "INCLUDE"
    non_key_attributes = ["Topic", "Count", "Due", "Open", "Owner", "OutstandingCreatedTime"]
  }
  global_secondary_index {
    name               = "Delivered"
    hash_key           = "TopicShard"
    range_key          = "DeliveryTime"
    projection_type    = "INCLUDE"
    non_key_attributes = ["Topic", "Count", "Due"]
  }
  global_secondary_index {
    name               = "DeliveredAllTopics"
    hash_key           = "Shard"
    range_key          = "DeliveryTime"
    projection_type    = "INCLUDE"
    non_key_attributes = ["Topic", "Count", "Due", "AcceptedAt", "Digest", "KeptUntil"]
  }

  ttl {
    attribute_name = "ExpiresAt"
    enabled        = true
  }
  point_in_time_recovery {
    enabled = true
  }

  lifecycle {
    prevent_destroy = true
  }
}

# `postrider run`. Attach it to the role of the instances or tasks.
data "aws_iam_policy_document" "daemon" {
  statement {
    sid = "Queues"
    actions = [
      "sqs:ChangeMessageVisibility",
      "sqs:DeleteMessage",
      "sqs:GetQueueAttributes",
      "sqs:GetQueueUrl",
      "sqs:ReceiveMessage",
      "sqs:SendMessage",
    ]
    resources = [local.queues]
  }
  statement {
    sid = "Tables"
    actions = [
      "dynamodb:BatchGetItem",
      "dynamodb:BatchWriteItem",
      "dynamodb:DeleteItem",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:GetItem",
      "dynamodb:PartiQLUpdate",
      "dynamodb:PutItem",
      "dynamodb:Query",
      "dynamodb:UpdateItem",
    ]
    resources = [aws_dynamodb_table.outbox.arn, aws_dynamodb_table.ledger.arn]
  }
  statement {
    sid       = "Indexes"
    actions   = ["dynamodb:Query"]
    resources = ["${aws_dynamodb_table.ledger.arn}/index/*"]
  }
  dynamic "statement" {
    for_each = var.inbound_queue_arn == null ? [] : [var.inbound_queue_arn]
    content {
      sid = "Inbound"
      actions = [
        "sqs:ChangeMessageVisibility",
        "sqs:DeleteMessage",
        "sqs:GetQueueAttributes",
        "sqs:GetQueueUrl",
        "sqs:ReceiveMessage",
      ]
      resources = [statement.value]
    }
  }
}

resource "aws_iam_policy" "daemon" {
  name_prefix = "postrider-daemon-"
  description = "What the Postrider daemon does with its queues and its tables."
  policy      = data.aws_iam_policy_document.daemon.json
}

# `postrider status`, `files`, `messages`, `dead list`, `dead export`, `destinations`,
# `check-config --connect`.
data "aws_iam_policy_document" "read" {
  statement {
    sid       = "Queues"
    actions   = ["sqs:GetQueueAttributes", "sqs:GetQueueUrl"]
    resources = [local.queues]
  }
  statement {
    sid = "Tables"
    actions = [
      "dynamodb:BatchGetItem",
      "dynamodb:DescribeTable",
      "dynamodb:DescribeTimeToLive",
      "dynamodb:GetItem",
      "dynamodb:Query",
    ]
    resources = [
      aws_dynamodb_table.outbox.arn,
      aws_dynamodb_table.ledger.arn,
      "${aws_dynamodb_table.ledger.arn}/index/*",
    ]
  }
}

resource "aws_iam_policy" "read" {
  name_prefix = "postrider-read-"
  description = "What Postrider's commands that only look do."
  policy      = data.aws_iam_policy_document.read.json
}

output "queue_prefix" {
  description = "For queue.sqs.prefix"
  value       = var.queue_prefix
}

output "outbox_table" {
  description = "outbox.dynamodb.table"
  value       = aws_dynamodb_table.outbox.name
}

output "daemon_policy_arn" {
  description = "For the role of the daemon"
  value       = aws_iam_policy.daemon.arn
}

output "read_policy_arn" {
  description = "For people who only look"
  value       = aws_iam_policy.read.arn
}

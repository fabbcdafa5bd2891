//! Properties and headers, from the AMQP client's types and into them.

use lapin::protocol::BasicProperties;
use lapin::types::{AMQPValue, DecimalValue, FieldArray, FieldTable, ShortString};

use super::BrokerError;
use crate::domain::delivery::{Bytes, HeaderValue, Headers, Properties};
use crate::domain::wire;

pub(super) fn properties_from(properties: &BasicProperties) -> Properties {
    let text = |value: &Option<ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    Properties {
        content_type: text(properties.content_type()),
        content_encoding: text(properties.content_encoding()),
        headers: properties.headers().as_ref().map(|table| headers_from(table, 1)),
        delivery_mode: *properties.delivery_mode(),
        priority: *properties.priority(),
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        expiration: text(properties.expiration()),
        message_id: text(properties.message_id()),
        timestamp: *properties.timestamp(),
        kind: text(properties.kind()),
        user_id: text(properties.user_id()),
        app_id: text(properties.app_id()),
        cluster_id: text(properties.cluster_id()),
        undecodable: None,
    }
}

fn headers_from(table: &FieldTable, depth: usize) -> Headers {
    table
        .into_iter()
        .map(|(name, value)| (name.as_str().to_owned(), header_from(value, depth)))
        .collect()
}

fn header_from(value: &AMQPValue, depth: usize) -> HeaderValue {
    match value {
        AMQPValue::Boolean(value) => HeaderValue::Boolean(*value),
        AMQPValue::ShortShortInt(value) => HeaderValue::ShortShortInt(*value),
        AMQPValue::ShortShortUInt(value) => HeaderValue::ShortShortUInt(*value),
        AMQPValue::ShortInt(value) => HeaderValue::ShortInt(*value),
        AMQPValue::ShortUInt(value) => HeaderValue::ShortUInt(*value),
        AMQPValue::LongInt(value) => HeaderValue::LongInt(*value),
        AMQPValue::LongUInt(value) => HeaderValue::LongUInt(*value),
        AMQPValue::LongLongInt(value) => HeaderValue::LongLongInt(*value),
        AMQPValue::Float(value) => HeaderValue::Float(value.to_bits()),
        AMQPValue::Double(value) => HeaderValue::Double(value.to_bits()),
        AMQPValue::DecimalValue(value) => HeaderValue::Decimal {
            scale: value.scale,
            value: value.value,
        },
        // Has no type octet on RabbitMQ's wire, so it never comes.
        AMQPValue::ShortString(value) => HeaderValue::text(value.as_str()),
        AMQPValue::LongString(value) => HeaderValue::LongString(Bytes(value.as_bytes().to_vec())),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) if depth >= wire::DEPTH_MAX => wire::too_deep(),
        AMQPValue::FieldArray(values) => HeaderValue::Array(
            values
                .as_slice()
                .iter()
                .map(|value| header_from(value, depth.saturating_add(1)))
                .collect(),
        ),
        AMQPValue::Timestamp(value) => HeaderValue::Timestamp(*value),
        AMQPValue::FieldTable(table) => HeaderValue::Table(headers_from(table, depth.saturating_add(1))),
        AMQPValue::ByteArray(value) => HeaderValue::ByteArray(Bytes(value.as_slice().to_vec())),
        AMQPValue::Void => HeaderValue::Void,
    }
}

pub(super) fn short(value: &str) -> Result<ShortString, BrokerError> {
    // lapin's other conversion panics.
    ShortString::try_new(value).map_err(|error| BrokerError::Refused {
        code: 502,
        text: error.to_string(),
    })
}

pub(super) fn properties_to(properties: &Properties) -> Result<BasicProperties, BrokerError> {
    let mut message = BasicProperties::default();
    type With = fn(BasicProperties, ShortString) -> BasicProperties;
    let texts: [(&Option<String>, With); 10] = [
        (&properties.content_type, BasicProperties::with_content_type),
        (&properties.content_encoding, BasicProperties::with_content_encoding),
        (&properties.correlation_id, BasicProperties::with_correlation_id),
        (&properties.reply_to, BasicProperties::with_reply_to),
        (&properties.expiration, BasicProperties::with_expiration),
        (&properties.message_id, BasicProperties::with_message_id),
        (&properties.kind, BasicProperties::with_type),
        (&properties.user_id, BasicProperties::with_user_id),
        (&properties.app_id, BasicProperties::with_app_id),
        (&properties.cluster_id, BasicProperties::with_cluster_id),
    ];
    for (value, with) in texts {
        if let Some(value) = value {
            message = with(message, short(value)?);
        }
    }
    if let Some(headers) = &properties.headers {
        message = message.with_headers(table_to(headers)?);
    }
    if let Some(value) = properties.delivery_mode {
        message = message.with_delivery_mode(value);
    }
    if let Some(value) = properties.priority {
        message = message.with_priority(value);
    }
    if let Some(value) = properties.timestamp {
        message = message.with_timestamp(value);
    }
    Ok(message)
}

fn table_to(headers: &Headers) -> Result<FieldTable, BrokerError> {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert(short(name)?, value_to(value)?);
    }
    Ok(table)
}

fn value_to(value: &HeaderValue) -> Result<AMQPValue, BrokerError> {
    Ok(match value {
        HeaderValue::Boolean(value) => AMQPValue::Boolean(*value),
        HeaderValue::ShortShortInt(value) => AMQPValue::ShortShortInt(*value),
        HeaderValue::ShortShortUInt(value) => AMQPValue::ShortShortUInt(*value),
        HeaderValue::ShortInt(value) => AMQPValue::ShortInt(*value),
        HeaderValue::ShortUInt(value) => AMQPValue::ShortUInt(*value),
        HeaderValue::LongInt(value) => AMQPValue::LongInt(*value),
        HeaderValue::LongUInt(value) => AMQPValue::LongUInt(*value),
        HeaderValue::LongLongInt(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(bits) => AMQPValue::Float(f32::from_bits(*bits)),
        HeaderValue::Double(bits) => AMQPValue::Double(f64::from_bits(*bits)),
        HeaderValue::Decimal { scale, value } => AMQPValue::DecimalValue(DecimalValue {
            scale: *scale,
            value: *value,
        }),
        HeaderValue::LongString(bytes) => AMQPValue::LongString(bytes.0.clone().into()),
        HeaderValue::Array(values) => AMQPValue::FieldArray(FieldArray::from(
            values.iter().map(value_to).collect::<Result<Vec<_>, _>>()?,
        )),
        HeaderValue::Timestamp(value) => AMQPValue::Timestamp(*value),
        HeaderValue::Table(headers) => AMQPValue::FieldTable(table_to(headers)?),
        HeaderValue::ByteArray(bytes) => AMQPValue::ByteArray(bytes.0.clone().into()),
        HeaderValue::Void => AMQPValue::Void,
    })
}

#[cfg(test)]
mod tests;

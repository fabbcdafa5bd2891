// A partner in Go: sign an update, publish it with a confirm, wait for its outcome.
//
//	echo '{"status":"cleared","allocationId":"..", ..}' | BROKER_URL=amqps://.. ENTERPRISE_ID=northwind PARTNER_KEY=<hex> partner
//
// The fields stand in docs/partners.md. OWN_EXCHANGE=yes: the operator made an exchange and a queue for this partner.
// It prints the outcome's event; exit 0: settled, 1: refused, 2: nothing was heard.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/btcsuite/btcd/btcec"
	amqp "github.com/rabbitmq/amqp091-go"
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

// text is compact JSON, with no character escaped that need not be: what is signed is the very text that travels.
func text(value any) string {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	must(0, encoder.Encode(value))
	return strings.TrimSuffix(out.String(), "\n")
}

func varint(n int) string {
	if n < 0xfd {
		return string([]byte{byte(n)})
	} else if n < 0x10000 {
		return string([]byte{0xfd, byte(n), byte(n >> 8)})
	}
	return string([]byte{0xfe, byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)})
}

// sign makes the compact recoverable signature of a Bitcoin signed message: header, r, s.
func sign(key *btcec.PrivateKey, payload string) string {
	once := sha256.Sum256([]byte("\x18Bitcoin Signed Message:\n" + varint(len(payload)) + payload))
	digest := sha256.Sum256(once[:])
	return hex.EncodeToString(must(btcec.SignCompact(btcec.S256(), key, digest[:], true)))
}

func main() {
	enterprise, url := os.Getenv("ENTERPRISE_ID"), os.Getenv("BROKER_URL")
	key, _ := btcec.PrivKeyFromBytes(btcec.S256(), must(hex.DecodeString(os.Getenv("PARTNER_KEY"))))
	var fields map[string]any
	must(0, json.NewDecoder(os.Stdin).Decode(&fields))
	payload := text(fields)
	kind := "allocation"
	if fields["allocationId"] == nil {
		kind = "deallocation"
	}
	nonce, about := fields["nonce"].(string), strings.ToLower(fields[kind+"Id"].(string))
	fields["payload"], fields["signature"] = payload, sign(key, payload)
	body := []byte(text(fields))
	digest := fmt.Sprintf("%x", sha256.Sum256(body))

	connection := must(amqp.Dial(url))
	channel := must(connection.Channel())
	must(0, channel.Confirm(false))
	returned := channel.NotifyReturn(make(chan amqp.Return, 1))
	exchange, outcomes := "settlement.updates."+enterprise, "settlement.outcomes."+enterprise
	if os.Getenv("OWN_EXCHANGE") == "" {
		// A queue of one's own, bound before anything is sent: what is told from now on is kept there.
		exchange, outcomes = "settlement.updates", enterprise+".outcomes"
		must(channel.QueueDeclare(outcomes, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}))
		must(0, channel.QueueBind(outcomes, "*.*."+enterprise, "settlement.events", false, nil))
	}
	confirmation := must(channel.PublishWithDeferredConfirmWithContext(context.Background(), exchange,
		enterprise+"."+kind+".update", true, false, amqp.Publishing{
			ContentType: "application/json", DeliveryMode: amqp.Persistent, MessageId: nonce, UserId: must(amqp.ParseURI(url)).Username, Body: body,
		}))
	if !confirmation.Wait() || len(returned) > 0 {
		log.Fatal("the broker did not take it, or no queue did: send the same bytes again")
	}
	log.Print("published, and confirmed by the broker")

	time.AfterFunc(30*time.Second, func() {
		log.Print("nothing for 30 s: see 'When there is silence' in docs/partners.md")
		os.Exit(2)
	})
	for delivery := range must(channel.Consume(outcomes, "", false, false, false, false, nil)) {
		list := []json.RawMessage{delivery.Body}
		if delivery.ContentType == "application/cloudevents-batch+json" {
			must(0, json.Unmarshal(delivery.Body, &list))
		}
		must(0, delivery.Ack(false))
		for _, raw := range list {
			var heard struct {
				Type string
				Data map[string]any
			}
			must(0, json.Unmarshal(raw, &heard))
			allocation, _ := heard.Data["allocation"].(map[string]any)
			// By nonce, by the bytes that were sent, or by what they are about: a settlement keeps the nonce that settled it.
			isMine := heard.Data["nonce"] == nonce || heard.Data["messageDigest"] == digest || allocation["id"] == about
			if isMine && heard.Type != "update.parked" {
				fmt.Println(string(raw))
				connection.Close()
				os.Exit(map[bool]int{heard.Type == "update.rejected": 1}[true])
			}
		}
	}
	log.Fatal("the broker closed the channel")
}
